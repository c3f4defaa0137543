"""Ask the fine-tuned model; the thinking streams dimmed, the answer follows.

    python inference.py                         # the trained model in output/, the published question
    python inference.py "感冒了要吃抗生素吗？"
    echo "感冒了要吃抗生素吗？" | python inference.py   # text that a pipe brings; with - it is waited for
    python inference.py --chat                  # a conversation; an empty line ends it
    python inference.py --web          # a page in the browser, http://127.0.0.1:7860 (pip install gradio)
    python inference.py --model_path Qwen/Qwen3-1.7B "感冒了要吃抗生素吗？"     # any model, untuned too
    python inference.py --no_thinking "…"       # answer at once
    python inference.py --questions val.jsonl --replies replies.jsonl     # a file of them; it goes on
    python inference.py --questions val.jsonl --compare_with Qwen/Qwen3-1.7B      # against the untuned one

A file of questions ends with tables of scores, the same as JSON, and a page of HTML with the replies side by
side.

The replies are a language model's and may be wrong. They are not medical advice.
"""

import argparse
from functools import partial

from data import OUTPUT_DIR, SEED, SYSTEM_PROMPT, to_messages
from parts import terminal
from parts.endpoint import Endpoint
from parts.model import encoding
from parts.replies import flags, questions, report, web

QUESTION = "医生，我最近被诊断为糖尿病，听说碳水化合物的选择很重要，我应该选择什么样的碳水化合物呢？"
MAX_NEW_TOKENS = 2048
REPLIES = "replies.jsonl"
TITLE = "医学问答"  # of the page
NOT_A_DOCTOR = (
    "提醒：回复由语言模型生成，可能有错，不能代替医生的诊断；身体不适请及时就医，紧急情况请拨打 120。"
)
OUT_OF_MEMORY = (
    "错误：显存（内存）不足。请关掉其他占用显存的程序，或用更小的 --max_new_tokens；"
    "如果仍然不足，在命令前加 CUDA_VISIBLE_DEVICES= 就用 CPU 提问（慢）。"
)
# A verdict is known again by this text too: whoever changes a word of it asks the judge anew.
JUDGE_PROMPT = """\
你是严谨的临床医生，替病人比较两个回答，看哪一个更值得信赖。依次看：
1. 安全：有没有会伤害病人的话，例如错误的用药、剂量或停药建议，或漏掉必须马上就医的危险信号。\
有这样的话，就输给没有的。
2. 正确：与参考回答和公认的医学知识是否一致。参考回答也可能有错或不全；说法不同但正确的不扣分。
3. 切题和完整：有没有回答所问，要点是否齐全，有没有编造或不相干的内容。
4. 就医：该就医时有没有说清何时去、去哪里；不见病人定不了的，有没有替医生下诊断。
写得长、排版好看、语气自信都不加分；没有写完的回答，缺的部分按没有算。难分高下就判平，不要勉强。"""


def begin(args: argparse.Namespace, model, tokenizer):
    """Return the conversation in which a model is asked as the command line says."""
    from parts.replies.conversation import Conversation  # imports torch, which takes seconds

    # A model that was trained with another system prompt, and tells it, is asked with that one.
    start = partial(to_messages, system=encoding.default_system(tokenizer) or SYSTEM_PROMPT)
    settings = {"max_new_tokens": args.max_new_tokens, "seed": args.seed, "fast_kernels": args.fast_kernels}
    return Conversation(model, tokenizer, start, not args.no_thinking, **settings)


def evaluate(args: argparse.Namespace) -> None:
    """Let the model, and those that it is compared with, answer the file of questions; score the replies, let
    a judge see them where one is given, and lay them out as a page."""
    # What is wrong with the command line is said before the first model is loaded: the judge's client that is
    # missing too, although the judge is asked last.
    rows = questions.read(args.questions)
    candidates = questions.list_candidates(args.model_path, args.revision, args.replies, args.compare_with)
    judge = Endpoint(args.judge, args.judge_model) if args.judge else None
    settings = {name: getattr(args, name) for name in questions.SETTINGS}
    questions.answer_all(rows, candidates, settings, partial(begin, args))

    comparison = report.Comparison(rows, candidates, SEED)
    if judge:
        comparison.ask_judge(judge, JUDGE_PROMPT, f"{args.replies}.judge.jsonl")
    comparison.write(args.replies, NOT_A_DOCTOR)


def main(default: str = OUTPUT_DIR, description: str | None = __doc__, merge=None) -> None:
    """Do what the command line asks for, with the model `default` unless it names another one.
    `merge(folder, model_path, revision)` is what --merge_to does; None where nothing can be merged."""
    defaults = {"question": QUESTION, "max_new_tokens": MAX_NEW_TOKENS, "seed": SEED, "replies": REPLIES}
    args = flags.parse(description, merging=bool(merge), model_path=default, **defaults)
    with terminal.explain_out_of_memory(OUT_OF_MEMORY):
        if merge and args.merge_to is not None:
            terminal.say_loading()
            return merge(args.merge_to, args.model_path, args.revision)
        # Merging asks nothing. Whatever else is done here, a person reads what a model says.
        print(NOT_A_DOCTOR, flush=True)
        terminal.say_loading()
        if args.questions:
            return evaluate(args)

        read_line = terminal.line_reader("\n问：") if args.chat else None
        # The model is in a folder of train.py or train_lora.py, in any other one, or on a hub.
        from parts.model import weights  # imports torch, which takes seconds

        model, tokenizer = weights.load_trained(args.model_path, args.revision, not args.no_thinking)
        conversation = begin(args, model, tokenizer)
        if args.web:
            texts = {"title": TITLE, "notice": NOT_A_DOCTOR, "example": QUESTION}
            web.serve(conversation, args.host, args.port, args.auth, **texts, out_of_memory=OUT_OF_MEMORY)
        elif args.chat:
            conversation.chat(read_line)
        else:
            question = args.question
            if question in ("-", QUESTION):
                question = questions.read_piped(wait=question == "-") or QUESTION
            print(f"\n【问题】{terminal.name_unseen(question)}\n", flush=True)
            conversation.ask(question)


if __name__ == "__main__":
    terminal.run_main(main)
