"""The flags of asking a model, and which of them make sense together; what is wrong with them is said before
a heavy library is imported. Knows no model: what holds where nothing is said is handed in."""

import argparse
from functools import partial

from parts import endpoint, terminal
from parts.replies import web

# A flag, and the one without which it would do nothing.
NEEDS = {"replies": "questions", "compare_with": "questions", "judge": "compare_with", "judge_model": "judge"}
NEEDS |= dict.fromkeys(("host", "port", "auth"), "web")


def parse(description: str | None, merging: bool = False, **defaults) -> argparse.Namespace:
    """Read the command line of asking; `defaults` are those of the flags that need one, and `merging` says
    whether there may be an adapter to merge instead. It ends the command, with one line, where a flag would
    do nothing or no page could be shown."""
    parser = terminal.Parser(description=description)
    add_asking(parser)
    add_questions(parser)
    add_page(parser)
    if merging:
        flag = parser.add_argument_group("合并").add_argument
        flag("--merge_to", metavar="DIR", help="把合并后的模型写到这里，不提问")
    parser.set_defaults(**defaults)
    args = parser.parse_args()

    # A flag that is written with its default value counts as not given: it changes nothing.
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    for name in given:
        if name in NEEDS and NEEDS[name] not in given:
            parser.error(f"--{name} 只和 --{NEEDS[name]} 一起起作用")
        if "merge_to" in given and name not in ("merge_to", "model_path", "revision"):
            parser.error(f"--merge_to 只合并，不提问；请去掉 {name}")
    # A port that is taken is told of now, not after the model is loaded.
    if args.web:
        web.check_server(args.host, args.port, args.auth)
    return args


def add_asking(parser: argparse.ArgumentParser) -> None:
    """Add what is asked, of which model, and how."""
    # argparse takes one of these at most; without any the published question is asked.
    ways = parser.add_argument_group("提问的方式，选一种").add_mutually_exclusive_group()
    flag = ways.add_argument
    flag("question", nargs="?", type=terminal.some_text, help="一个问题，- 读标准输入（不写：公开方案的）")
    flag("--chat", action="store_true", help="在终端里多轮对话，空行结束")
    flag("--web", action="store_true", help="在浏览器里对话")
    questions = "回答一个文件里的所有问题，并评分：.txt，或 data.py 能读的"
    flag("--questions", metavar="FILE", help=questions)

    positive, natural = partial(terminal.whole_number, 1), partial(terminal.whole_number, 0)
    flag = parser.add_argument_group("模型和回复").add_argument
    flag("--model_path", metavar="MODEL", help="模型或适配器的文件夹，或 hub 上的名称（默认 %(default)s）")
    flag("--revision", help="hub 上模型的分支、标签或提交")
    flag("--no_thinking", action="store_true", help="不思考，直接回答")
    flag("--max_new_tokens", metavar="N", type=positive, help="每个回复最多的 token 数（默认 %(default)s）")
    flag("--seed", metavar="N", type=natural, help="采样的种子（默认 %(default)s）")
    switch = {"metavar": "false", "type": terminal.true_or_false, "default": True}
    flag("--fast_kernels", **switch, help="false：不用 CUDA graph 和融合算子")


def add_questions(parser: argparse.ArgumentParser) -> None:
    """Add what becomes of a file of questions."""
    flag = parser.add_argument_group("和 --questions 一起").add_argument
    flag("--replies", metavar="FILE", help="回复写在这里；已有的不再问（默认 %(default)s）")
    several = {"action": "append", "default": []}
    flag("--compare_with", metavar="X", **several, help="与这个模型、适配器或回复文件比较；可以写多次")
    judge = f"再由这个地址的模型评哪个好；密钥读自环境变量 {endpoint.KEY}"
    flag("--judge", metavar="URL", type=endpoint.address, help=judge)
    flag("--judge_model", metavar="NAME", help="由哪个模型评审（只有一个时不需要）")


def add_page(parser: argparse.ArgumentParser) -> None:
    """Add where the page is, and who gets in."""
    port = partial(terminal.whole_number, 1)
    flag = parser.add_argument_group("和 --web 一起").add_argument
    # Nobody else gets in by default: the page has no password unless one is given.
    flag("--host", default="127.0.0.1", help="页面的地址；不是本机的要有 --auth（默认 %(default)s）")
    flag("--port", metavar="N", type=port, default=7860, help="页面的端口（默认 %(default)s）")
    flag("--auth", metavar="USER:PASSWORD", type=web.user_and_password, help="打开页面要的用户名和密码")
