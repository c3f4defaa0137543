"""The flags of asking a model, and which of them make sense together; all that is wrong with them is said before a
model is loaded. Knows no model: what holds where nothing is said is handed in."""

import argparse
import importlib.util
from functools import partial

from parts import candidates, endpoint, question_file, reply_file, terminal, upload, web

SCORING = ("rouge_score", "rjieba", "sacrebleu")  # packages: without them an hour of replies would end in no table
ACTS_WITH = (  # a flag, and those of which it needs one
    ("replies", "questions"),
    ("compare_with", "questions"),
    ("judge", "compare_with"),
    ("judge_model", "judge"),
    ("host", "web"),
    ("port", "web"),
    ("auth", "web"),
    ("yes", "push_to"),
)


def add_ways(parser: argparse.ArgumentParser) -> None:
    """One question, or many; at the terminal, or on a page."""
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument(
        "question", nargs="?", type=terminal.some_text, help="the question (default: the published one)"
    )
    one_of.add_argument("--chat", action="store_true", help="hold a conversation")
    one_of.add_argument(
        "--questions",
        metavar="FILE",
        type=question_file.read,
        help="answer all of a .txt file, a question a line, or a .jsonl file with a field question, and score the "
        "replies; where it has fields answer and think, those are what they are held against",
    )
    one_of.add_argument("--web", action="store_true", help="show a page in the browser on which the model is asked")


def build_parser(description: str, **defaults) -> argparse.ArgumentParser:
    """The command line of asking; `defaults` are those of the flags that need one."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_ways(parser)
    flag = parser.add_argument
    flag("--host", help="where the page is; others want --auth (default: %(default)s)")
    flag("--port", type=partial(terminal.whole_number, 1), help="of the page (default: %(default)s)")
    flag(
        "--auth",
        metavar="USER:PASSWORD",
        type=web.user_and_password,
        help="what the page asks for before it shows anything",
    )
    flag(
        "--replies",
        metavar="FILE",
        help="where those replies go, as .jsonl; of a file that is there, the missing ones (default: %(default)s)",
    )
    flag(
        "--compare_with",
        metavar="X",
        action="append",
        default=[],
        help="also let this model or adapter answer, or take this file of replies (.jsonl); may be repeated",
    )
    flag(
        "--judge",
        metavar="URL",
        type=endpoint.address,
        help="also ask the model at this OpenAI-compatible address, http://127.0.0.1:8000/v1, which answer is better; "
        f"its key, if it wants one, is read from {endpoint.KEY}",
    )
    flag("--judge_model", metavar="NAME", help="which model of that address (default: its only one)")
    flag("--model_path", help="folder or ModelScope id (default: %(default)s)")
    flag("--revision", help="branch, tag or commit of the ModelScope model (default: master)")
    flag(
        "--push_to",
        metavar="modelscope:owner/name",
        type=upload.repository,
        help="instead of asking, show what of the trained model in --model_path would be uploaded there",
    )
    flag("--yes", action="store_true", help="with --push_to: upload it; a new repository is private")
    flag("--no_thinking", action="store_true", help="answer without thinking first")
    flag("--max_new_tokens", type=partial(terminal.whole_number, 1), help="default: %(default)s")
    flag("--seed", type=partial(terminal.whole_number, 0), help="of the sampling (default: %(default)s)")
    parser.set_defaults(**defaults)
    return parser


def given(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> bool:
    """Whether a flag says anything but its default."""
    return getattr(args, name) != parser.get_default(name)


def parse_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; what is wrong with its files is said before a model is loaded."""
    args = parser.parse_args()
    if args.questions:
        check_files(args)
    for name in vars(args).keys() - {"push_to", "yes", "model_path"} if args.push_to else ():
        if given(parser, args, name):
            parser.error(f"--push_to 只上传，不提问；请去掉 {name}")
    for name, others in ACTS_WITH:
        if given(parser, args, name) and not any(getattr(args, other) for other in others.split()):
            parser.error(f"--{name} 只和 {' 或 '.join(f'--{other}' for other in others.split())} 一起起作用")
    if args.web:
        web.check(args.host, args.port, args.auth)
    return args


def check_files(args: argparse.Namespace) -> None:
    """Raises SystemExit where the replies to a file of questions could not be written, compared or scored."""
    if missing := [name for name in SCORING if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"错误：--questions 评分要用 {'、'.join(missing)}；请先运行 pip install -r requirements.txt")
    candidates.check(args.questions, args.replies, args.compare_with)
    if taken := [str(path) for path in reply_file.places_of_results(args.replies) if path.is_dir()]:
        raise SystemExit(f"错误：{taken[0]} 是一个文件夹，而分数要写在那里；请用 --replies 换一个文件名。")
