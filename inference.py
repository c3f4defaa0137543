"""Ask the fine-tuned model; the thinking streams dimmed, the answer follows.

    python inference.py                         # the trained model in output/, the published question
    python inference.py "感冒了要吃抗生素吗？"
    python inference.py --chat                  # a conversation; an empty line ends it
    python inference.py --web                   # a page in the browser, http://127.0.0.1:7860 (pip install gradio)
    python inference.py --model_path Qwen/Qwen3-1.7B "感冒了要吃抗生素吗？"     # any other model, the untuned one too
    python inference.py --no_thinking "…"       # answer at once
    python inference.py --questions val.jsonl --replies replies.jsonl     # a file of them; run again, it goes on
    python inference.py --questions val.jsonl --compare_with Qwen/Qwen3-1.7B      # and held against the untuned one
    python inference.py --push_to modelscope:owner/name                   # instead of asking: what would be uploaded
    python inference.py --push_to modelscope:owner/name --yes             # upload it

A file of questions ends with tables of scores, the same as JSON, and a page of HTML with the replies side by side.

The replies are a language model's and may be wrong. They are not medical advice.
"""

import argparse
import os
from functools import partial
from pathlib import Path

try:
    from data import OUTPUT_DIR, SEED, SYSTEM_PROMPT, to_messages
    from parts import (
        adapters,
        asking,
        candidates,
        checkpoints,
        endpoint,
        reply_file,
        system_prompt,
        terminal,
        upload,
        web,
    )
except ModuleNotFoundError as error:  # python -P, a copy without parts/, or nothing installed yet
    raise SystemExit(
        f"错误：找不到 {error.name}；请在完整的项目文件夹里运行，不要用 python -P；缺的是库，就先运行 "
        "pip install -r requirements.txt"
    ) from None

QUESTION = "医生，我最近被诊断为糖尿病，听说碳水化合物的选择很重要，我应该选择什么样的碳水化合物呢？"
MAX_NEW_TOKENS = 2048
REPLIES = "replies.jsonl"
TITLE = "医学问答"  # of the page
HOST, PORT = "127.0.0.1", 7860  # this machine only; gradio's own port
NOT_A_DOCTOR = "提醒：回复由语言模型生成，可能有错，不能代替医生的诊断；身体不适请及时就医，紧急情况请拨打 120。"
OUT_OF_MEMORY = (
    "错误：显存（内存）不足。请关掉其他占用显存的程序，或用更小的 --max_new_tokens；"
    "还不够就在 CPU 上提问：在命令前加 CUDA_VISIBLE_DEVICES= （慢）。"
)

JUDGE_PROMPT = """\
你是严谨的临床医生，替病人比较两个回答，看哪一个更值得信赖。依次看：
1. 安全：有没有会伤害病人的话，例如错误的用药、剂量或停药建议，或漏掉必须马上就医的危险信号。有这样的话，就输给没有的。
2. 正确：与参考回答和公认的医学知识是否一致。参考回答也可能有错或不全；说法不同但正确的不扣分。
3. 切题和完整：有没有回答所问，要点是否齐全，有没有编造或不相干的内容。
4. 就医：该就医时有没有说清何时去、去哪里；不见病人定不了的，有没有替医生下诊断。
写得长、排版好看、语气自信都不加分；没有写完的回答，缺的部分按没有算。难分高下就判平，不要勉强。"""


def find_local(name: str, revision: str | None = None) -> Path | None:
    """The folder with the best weights below an output folder of train.py or any folder with a model; None for a
    model of a hub."""
    return checkpoints.find_trained(name) if (os.path.isdir(name) or name == OUTPUT_DIR) and not revision else None


def find_trained(name: str, revision: str | None = None, thinking: bool = True) -> tuple[str]:
    """What load_found takes: the folder of a local model, or of one that comes from ModelScope. Raises SystemExit when
    it is to be asked without `thinking` and cannot be."""
    from parts import hub, models

    path = str(find_local(name, revision) or hub.find_model(name, "检查 --model_path", revision))
    if not thinking:
        models.require_no_thinking(path)
    return (path,)


def load_found(path: str):
    """(model, tokenizer) of what `find_trained` found."""
    from parts import models, replies

    model, tokenizer = models.load_weights(path, models.pick_device()), models.load_tokenizer(path)
    replies.settle_generation(model, tokenizer)
    return model, tokenizer


def load_trained(name: str, revision: str | None = None, thinking: bool = True):
    """(model, tokenizer) from an output folder of train.py, any folder with a model, or a ModelScope id."""
    return load_found(*find_trained(name, revision, thinking))


MODEL = candidates.Kind(find_local, find_trained, load_found)
ADAPTER = candidates.Kind(adapters.locate, adapters.find, adapters.load)


def begin(model, tokenizer, args: argparse.Namespace):
    """(the conversation with a model, what makes its messages of a question)."""
    from parts.conversation import Conversation

    system = system_prompt.default(tokenizer)  # what the model was trained with
    conversation = Conversation(model, tokenizer, not args.no_thinking, args.max_new_tokens, args.seed)
    return conversation, partial(to_messages, system=SYSTEM_PROMPT if system is None else system)


def predict(model, tokenizer, args: argparse.Namespace) -> None:
    """The conversation at the terminal, or the one question."""
    conversation, start = begin(model, tokenizer, args)
    conversation.console.print(NOT_A_DOCTOR, style="yellow", soft_wrap=True)
    if args.chat:
        conversation.chat(start)
    else:
        conversation.console.print(f"\n【问题】{args.question}\n", markup=False, soft_wrap=True)
        conversation.ask(start(args.question))


def kind_of(name: str) -> candidates.Kind:
    """Of what the model is compared with."""
    return ADAPTER if checkpoints.holds_adapter(name) else MODEL


def serve(args: argparse.Namespace, kind: candidates.Kind) -> None:
    """The page on which the model is asked."""
    conversation, start = begin(*kind.load(*kind.find(args.model_path, args.revision, not args.no_thinking)), args)
    texts = {"title": TITLE, "notice": NOT_A_DOCTOR, "example": QUESTION, "out_of_memory": OUT_OF_MEMORY}
    web.serve(conversation, start, args.host, args.port, args.auth, **texts)


def evaluate(args: argparse.Namespace, kind: candidates.Kind) -> None:
    """The file of questions, answered by the model and by those that it is compared with, scored, judged where a judge
    is given, and laid out as a page."""
    from rich.console import Console

    console = Console(highlight=False, emoji=False)
    judging = endpoint.Endpoint(args.judge, args.judge_model) if args.judge else None
    settings = {name: getattr(args, name) for name in reply_file.FLAGS}
    asked = [candidates.candidate(kind, args.model_path, args.revision, args.replies, settings)]
    for name in args.compare_with:
        asked.append(candidates.candidate(kind_of(name), name, None, candidates.beside(args.replies, name), settings))
    answered = candidates.answer(args.questions, asked, partial(begin, args=args))

    from parts import comparison, page

    measured = [comparison.measure(args.questions, each) for each in answered]
    verdicts = comparison.judge_all(args.questions, measured, judging, JUDGE_PROMPT, args.replies, console)
    tables = comparison.tables(measured, verdicts)
    scores, shown = reply_file.places_of_results(args.replies)
    comparison.report(measured, verdicts, tables, scores, console)
    cases = comparison.cases(args.questions, measured, verdicts)
    page.write(str(shown), f"{answered[0].name} 的回复", tables, cases, measure="ROUGE-L 相差", notice=NOT_A_DOCTOR)
    console.print(f"网页：{shown}\n{NOT_A_DOCTOR}", markup=False, soft_wrap=True)


def build_parser(description: str, output_dir: str) -> argparse.ArgumentParser:
    """The flags of asking what is in `output_dir`."""
    defaults = {"question": QUESTION, "model_path": output_dir, "max_new_tokens": MAX_NEW_TOKENS, "seed": SEED}
    return asking.build_parser(description, replies=REPLIES, host=HOST, port=PORT, **defaults)


def ask(args: argparse.Namespace, kind: candidates.Kind) -> None:
    """What the command line asks for, of a model of this kind."""
    with terminal.explain_out_of_memory(OUT_OF_MEMORY):
        if args.push_to:
            upload.run(args.push_to, Path(args.model_path), args.yes)
        elif args.questions:
            evaluate(args, kind)
        elif args.web:
            serve(args, kind)
        else:
            predict(*kind.load(*kind.find(args.model_path, args.revision, not args.no_thinking)), args)


def main() -> None:
    ask(asking.parse_flags(build_parser(__doc__, OUTPUT_DIR)), MODEL)


if __name__ == "__main__":
    terminal.run_main(main)
