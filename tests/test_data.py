"""From a file or the hub to train.jsonl and val.jsonl: the published split, no text altered, no row lost in silence."""

import codecs
import hashlib
import json
import random
import re
import sys
from pathlib import Path

import pytest
from conftest import run_script
from hub import Hub

import data


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Every test works in its own empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def published(rows) -> tuple[list, list]:
    """The split of the published training script, in its own words."""
    rows = list(rows)
    random.seed(42)
    random.shuffle(rows)
    cut = int(len(rows) * 0.9)
    return rows[:cut], rows[cut:]


def written(folder: Path = Path()) -> tuple[list[dict], list[dict]]:
    texts = (Path(folder, name).read_text(encoding="utf-8") for name in ("train.jsonl", "val.jsonl"))
    return tuple([json.loads(line) for line in text.split("\n")[:-1]] for text in texts)


@pytest.fixture
def fails(folder, monkeypatch):
    """Run the command line in this process: it must end with one error and leave every file as it was."""

    def run(message: str, *flags: str) -> None:
        before = contents(folder)
        monkeypatch.setattr(sys, "argv", ["data.py", *flags])
        with pytest.raises(SystemExit) as ended:
            data.main()
        assert says(str(ended.value), message), ended.value
        assert contents(folder) == before  # and no draft is left behind

    return run


@pytest.mark.parametrize("total, train, val", [(2, 1, 1), (11, 9, 2), (2407, 2166, 241)])
def test_split_is_the_published_one(total, train, val):
    data.prepare(save(make_rows(total), "rows.jsonl"))
    assert written() == published(make_rows(total))
    assert [len(part) for part in written()] == [train, val]


@pytest.mark.parametrize("place", [0, 17, 39])
def test_bad_row_moves_no_other(place):
    rows = make_rows(40)
    data.prepare(save(rows, "good.jsonl"))
    good = written()
    data.prepare(save(rows[:place] + [make_row(0, answer="")] + rows[place + 1 :], "bad.jsonl"))
    assert written() == tuple([row for row in part if row != rows[place]] for part in good)


BAD = {
    '{"question": "问", "answer": "答"}': "缺少字段 think",
    '{"question": null, "think": "思", "answer": "答"}': "question 为 null",
    '{"question": "问", "think": "思", "answer": 5}': "answer 不是文本",
    '{"question": "问", "think": NaN, "answer": "答"}': "think 不是文本",
    '{"question": "问", "think": ["思"], "answer": "答"}': "think 不是文本",
    '{"question": "问", "think": "思", "answer": %s}' % ("1" * 5000): "answer 不是文本",  # more than int() takes
    '{"question": "", "think": "思", "answer": "答"}': "question 为空",
    '{"question": "问", "think": " \\t\\n\u3000", "answer": "答"}': "think 为空",
    '{"question": "问", "think": "\\\\n", "answer": "答"}': "think 为空",  # a literal backslash-n alone
    '{"question": "问", "think": "思", "answer": "\\ud83d"}': "answer 含无效字符（不成对的代理码点）",
    '["问", "思", "答"]': "不是对象",
    "null": "不是对象",
    '{"question": "问", "think": "思", "answer": {"text": "答"}}': "answer 不是文本",
    '{"question": "问", "think": "思", "answer": -Infinity}': "answer 不是文本",
    '{"question": "问", "think": "思", "answer": true}': "answer 不是文本",
    '{"question": "问", "question": "另问", "think": "思", "answer": "答"}': "同一字段出现多次",
    '{"question": "问", "think": "<think>思</think>", "answer": "答"}': "think 含 <think> 或 </think> 标签",
    '{"question": "问", "think": "思", "answer": "思</think>答"}': "answer 含 <think> 或 </think> 标签",
}


@pytest.mark.parametrize("line, problem", BAD.items(), ids=lambda value: value[:60])
def test_unusable_row_is_left_out_and_named(line, problem, capsys):
    lines = as_jsonl(make_rows(30)).splitlines()
    lines[6] = line
    Path("rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data.prepare("rows.jsonl")
    assert f"\n未采用    {problem}：1 行（第 7 行）\n" in capsys.readouterr().out
    assert written() == tuple([row for row in part if row != make_row(7)] for part in published(make_rows(30)))


@pytest.mark.parametrize("first, second", [(0, 0), (1, 1), (0, 1)], ids=["in train", "in val", "in both"])
@pytest.mark.parametrize("change", [{}, {"answer": "另一个回答"}], ids=["same answer", "other answer"])
def test_repeated_rows_and_questions_of_both_parts_are_left_out(first, second, change, capsys):
    parts = published(range(1, 41))
    original, copy = parts[first][1], parts[second][2]
    rows = make_rows(40, first=0)  # row 0 is not saved: numbers count from 1
    rows[copy] = make_row(original, **change)
    spaced = [row | {"think": row["think"] + " " * i} for i, row in enumerate(rows)]  # white space is no difference
    data.prepare(save(spaced[1:], "rows.jsonl"))
    # Two answers to one question are two examples, as long as both are in one part.
    problem = "验证集的问题也在训练集里" if first != second else None if change else "与前面的行重复"
    assert f"\n未采用    {f'{problem}：1 行（第 {copy} 行）' if problem else '0 行'}\n" in capsys.readouterr().out
    assert written() == tuple([rows[i] for i in part if not (problem and i == copy)] for part in parts)


def test_many_problems_are_counted_by_kind_with_the_first_five_lines(capsys):
    rows = make_rows(100)
    for number in (3, 14, 15, 40, 60, 61, 98):
        rows[number - 1]["think"] = "  "
    rows[19]["answer"] = rows[49]["answer"] = None
    # An empty line counts as a line but is no row.
    Path("rows.jsonl").write_text(as_jsonl(rows).replace("\n", "\n\n", 1), encoding="utf-8")
    data.prepare("rows.jsonl")
    out = capsys.readouterr().out
    assert out.startswith("数据来源  rows.jsonl：共 100 行\n") and out.count("未采用") == 2
    assert "\n未采用    answer 为 null：2 行（第 21、51 行）\n" in out
    assert "\n未采用    think 为空：7 行（第 4、15、16、41、61 等 行）\n" in out


def test_summary_tells_counts_lengths_and_an_example(capsys):
    data.prepare(save([make_row(i, think="思" * i) for i in (2, 150, 4)], "rows.csv"), "new/a.jsonl", "b.jsonl")
    checksum = hashlib.sha256(Path("rows.csv").read_bytes()).hexdigest()
    assert capsys.readouterr().out == (
        f"数据来源  rows.csv：共 3 行\nSHA-256   {checksum}\n"
        "已写入    new/a.jsonl：2 行\n已写入    b.jsonl：1 行\n未采用    0 行\n"
        "字符数    question：平均 5，中位数 4，最长 6\n字符数    think：平均 52，中位数 4，最长 150\n"
        "字符数    answer：平均 5，中位数 4，最长 6\n\n"
        f"示例（训练集第 1 行）\n  问题：问题150？\n  思考：{'思' * 120}……\n  回答：回答150。\n"
    )


CLEANED = {
    " \t\n头痛\u3000\r\n": "头痛",
    "如下：\\n1. 休息": "如下：\n1. 休息",
    "一\\n\\n二": "一\n\n二",
    "一。\\n第二": "一。\n第二",
    "\\n一\\n": "一",
    "一\r\n二\n三": "一\n二\n三",
    r"频率 $\nu$ 与 $\nabla f$": r"频率 $\nu$ 与 $\nabla f$",
    r"C:\new": r"C:\new",
    "里面  的 空格\t不动": "里面  的 空格\t不动",
}


@pytest.mark.parametrize("raw, cleaned", CLEANED.items())
def test_text_is_cleaned_and_else_untouched(raw, cleaned):
    data.prepare(save([dict.fromkeys(rows.FIELDS, raw), make_row(1)], "rows.jsonl"))
    assert dict.fromkeys(rows.FIELDS, cleaned) in sum(written(), [])


ENDINGS = [".jsonl", ".json", ".csv", ".parquet"]
TEXTS = [
    *("0456", "2024-01-02", "NA", "null", "NaN", "None", "True", "1e5", "", " 空 ", "#注", "'单'", "😀", "\\n"),
    *("分行\u2028后", "分段\u0085\u2029后", '一，a,b\n“二”\n\n"三";\t四', "\n", "甲\r\n乙"),
]
ROWS = [{"question": f"{i}", "think": text, "answer": text * 2} for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("ending", [*ENDINGS, ".JSONL", ".Json", ".CSV", ".PARQUET"])
def test_every_format_gives_the_same_rows_of_the_same_texts(ending):
    assert row_files.read(save(ROWS, "plain" + ending)) == list(enumerate(ROWS, 1))
    assert row_files.read(save(ROWS, "marked" + ending, codecs.BOM_UTF8)) == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("ending", ENDINGS)
def test_script_reads_each_format_and_writes_only_the_three_fields(folder, ending):
    # A process of its own: here, what this file imports could stand in for an import that data.py forgot.
    rows = [{"id": str(i), **dict(reversed(row.items())), "来源": "x"} for i, row in enumerate(make_rows(20))]
    result = run_script("data.py", "--dataset", save(rows, "rows" + ending), cwd=folder)
    assert result.returncode == 0, result.stdout
    texts = [as_jsonl(part) for part in published(make_rows(20))]  # UTF-8, one object a line, the same keys in order
    assert [Path(name).read_bytes() for name in ("train.jsonl", "val.jsonl")] == [text.encode() for text in texts]


WRITE = "无法写入 {train}、{val}（%s）；请检查权限和磁盘空间，或用 --train_file、--val_file 换位置。"
SAME = "--train_file 和 --val_file 都是 {train}；请给两个不同的文件名。"
SOURCE = "写入会覆盖原始数据 rows.jsonl；请用 --train_file、--val_file 换个文件名。"
OUTPUTS = [
    ("train.jsonl", "sub", WRITE % "是一个文件夹"),
    ("sub", "val.jsonl", WRITE % "是一个文件夹"),
    ("train.jsonl", "rows.jsonl/val.jsonl", WRITE % "File exists"),
    ("train.jsonl", "v" * 300, WRITE % "File name too long"),
    *[
        ("train.jsonl", same, SAME)
        for same in ("train.jsonl", "./train.jsonl", "sub/../train.jsonl", "link/train.jsonl")
    ],
    ("rows.jsonl", "val.jsonl", SOURCE),
    ("train.jsonl", "link/rows.jsonl", SOURCE),
]


@pytest.mark.parametrize("old", [{}, {"train.jsonl": b"old\r\n", "val.jsonl": b""}], ids=["new", "over old ones"])
@pytest.mark.parametrize("train, val, message", OUTPUTS, ids=[f"{train}-{val[:20]}" for train, val, _ in OUTPUTS])
def test_both_files_are_written_or_none_and_no_file_over_another(folder, fails, train, val, message, old):
    Path("sub").mkdir()
    Path("link").symlink_to(folder)
    for name, content in old.items():
        Path(name).write_bytes(content)
    source = save(make_rows(20), "rows.jsonl")
    fails(message.format(train=train, val=val), "--dataset", source, "--train_file", train, "--val_file", val)


GOOD = as_jsonl(make_rows(20))
HEAD = "question,think,answer\n"
MISSING = "找不到数据文件 {}；请检查路径，或不带 --dataset 运行 python data.py 下载公开数据集。"
EMPTY = "{} 是空文件；请换一个有内容的文件。"
FORMAT = "不认识 {} 的格式；请转成 .jsonl、.json、.csv 或 .parquet（UTF-8）再用 --dataset 指定。"
JSON = "{} 第 %s 行不是合法的 JSON（%s 列）；请修正这一行。"
CODING = "{} 第 %s 行不是 UTF-8 编码（该行第 %s 字节）；请另存为 UTF-8，例如：iconv -f %s -t UTF-8 {} > utf8[]"
NUL = "{} 第 %s 行含 NUL 字节：文件损坏，或是 UTF-16 编码；请另存为 UTF-8。"
DEEP = "{} 第 %s 行的 JSON 嵌套过深；每行只要一个简单的对象。"
COLUMNS = "数据缺少列 %s（现有的列：%s）；请改列名为 question、think、answer。"
CSV = "{} 不是合法的 CSV（%s）；含逗号或换行的文字请用双引号括起。"
PARQUET = "{} 不是完整的 Parquet 文件（~）；请重新导出。"
NO_ROWS = "{} 里没有一行数据；每行需要 question、think、answer 三个字段。"
TOO_FEW = "%s 行中可用的有 %s 行，划分后%s为空；请提供更多不同的行。"
EQUAL = "\n  与前面的行重复：8 行（第 1、3、4、5、6 等 行）\n  验证集的问题也在训练集里：1 行（第 2 行）"
NEITHER = "--dataset {} 既不是已有的文件，也不是 ModelScope 数据集名（形如 krisfu/delicate_medical_r1_data）。"
OBJECT = "{} 应是对象的数组 [{…}, …]；每行一个对象的文件请命名为 .jsonl。"
ALL = "question、think、answer"
VAL_PLACES = sorted(published(range(1, 21))[1])
ERRORS = [  # name, content (None: nothing, ...: a folder, Path: a link), message with {} for the name, [] its ending
    ("missing.jsonl", None, MISSING),
    ("folder.jsonl", ..., MISSING),
    ("n" * 300 + ".jsonl", None, MISSING),
    ("empty.jsonl", "", EMPTY),
    ("blank.csv", " \n\t\r\n", EMPTY),
    ("only-a-mark.json", "\ufeff\n", EMPTY),
    ("rows.xlsx", "x", FORMAT),
    ("folder", ..., FORMAT),
    ("gbk.jsonl", GOOD.encode() + GOOD.encode("gbk"), CODING % (21, 15, "GB18030")),
    ("gbk.json", '[\n"我"]'.encode("gbk"), CODING % (2, 2, "GB18030")),
    ("gbk.csv", f"{HEAD}q,t,a\n问,思,答\n".encode("gbk"), CODING % (3, 1, "GB18030")),
    ("utf-16.jsonl", GOOD.encode("utf-16"), CODING % (1, 1, "UTF-16")),
    ("utf-16.json", json.dumps(make_rows(2)).encode("utf-16"), CODING % (1, 1, "UTF-16")),
    ("utf-16-unmarked.csv", HEAD.encode("utf-16-be"), NUL % 1),
    ("utf-16-unmarked.jsonl", GOOD.encode("utf-16-le"), NUL % 1),
    ("utf-32.jsonl", GOOD.encode("utf-32"), CODING % (1, 1, "UTF-32")),
    ("half-a-pair.jsonl", GOOD.encode().replace("思考7".encode(), b"\xed\xa0\xbd"), CODING % (7, 38, "GB18030")),
    ("latin-1.csv", f"{HEAD}caf\xe9,t,a\n".encode("latin-1"), CODING % (2, 4, "GB18030")),
    ("nul.jsonl", GOOD.replace("思考7", "思\0考7"), NUL % 7),
    ("nul.csv", f"{HEAD}q,t\0,a\n", NUL % 2),
    ("zeros-at-the-end.jsonl", GOOD + "\0" * 512, NUL % 21),
    ("old-mac.jsonl", GOOD.replace("\n", "\r"), JSON % (1, "Extra data，第 57")),
    (
        "two-marks.jsonl",
        f"{GOOD}\ufeff{GOOD}",
        JSON % (21, "Unexpected UTF-8 BOM (decode using utf-8-sig)，第 1"),
    ),
    (
        "50-MB-line-cut.jsonl",
        f'{GOOD}{{"think": "' + "思" * 17_000_000,
        JSON % (21, "Unterminated string starting at，第 11"),
    ),
    (
        "single-quotes.jsonl",
        GOOD.replace('"', "'"),
        JSON % (1, "Expecting property name enclosed in double quotes，第 2"),
    ),
    ("comma-at-the-end.json", "[{},\n]", JSON % ("~", "~")),
    ("half-an-array.json", json.dumps(make_rows(2), indent=1)[:-2], JSON % (11, "Expecting ',' delimiter，第 3")),
    ("rows-in-data.json", json.dumps({"data": make_rows(20)}), OBJECT),
    ("capitals.jsonl", GOOD.replace("question", "Question"), COLUMNS % ("question", "Question、answer、think")),
    ("semicolons.csv", "question;think;answer\nq;t;a\n", COLUMNS % (ALL, "question;think;answer")),
    ("spaces.csv", "question, think, answer\nq,t,a\n", COLUMNS % ("think、answer", " answer、 think、question")),
    ("no-header.csv", "q1,t1,a1\nq2,t2,a2\n", COLUMNS % (ALL, "a1、q1、t1")),
    (
        "numbers.parquet",
        as_parquet({"question": ["q"], "think": ["t"]} | {"answer": [None]}),
        TOO_FEW % (1, 0, "训练集") + "\n  answer 为 null：1 行（第 1 行）",
    ),
    (
        "tags-in-all.jsonl",
        GOOD.replace("思考", "<think>思考"),
        TOO_FEW % (20, 0, "训练集") + "\n  think 含 <think> 或 </think> 标签：20 行（第 1、2、3、4、5 等 行）",
    ),
    (
        "validation-empty.jsonl",
        as_jsonl([row | {"answer": ""} if row in published(make_rows(20))[1] else row for row in make_rows(20)]),
        TOO_FEW % (20, 18, "验证集") + "\n  answer 为空：2 行（第 {}、{} 行）".format(*VAL_PLACES),
    ),
    ("link-to-itself.jsonl", Path("link-to-itself.jsonl"), MISSING),
    ("link-to-nothing.jsonl", Path("nothing"), MISSING),
    ("link-to-a-folder.jsonl", Path(), MISSING),
    ("unreadable.jsonl", Path("/proc/self/mem"), "无法读取 {}（Input/output error）；请检查文件权限。"),
    ("words.jsonl", f"{GOOD}\n头痛\n", JSON % (22, "Expecting value，第 1")),
    ("cut.jsonl", GOOD[:-5], JSON % (20, "Unterminated string starting at，第 51")),
    ("lines.json", GOOD, JSON % (2, "Extra data，第 1")),
    ("deep.jsonl", GOOD + "[" * 100000, DEEP % 21),
    ("deep.json", "[" * 100000, DEEP % 1),
    ("array.jsonl", json.dumps(make_rows(20)), COLUMNS % (ALL, "无")),
    ("object.json", "{}", OBJECT),
    ("none.json", "[]", NO_ROWS),
    ("none.csv", HEAD, NO_ROWS),
    ("none.parquet", as_parquet({field: [] for field in rows.FIELDS}), NO_ROWS),
    ("columns.jsonl", as_jsonl([{"think": "思", "问": "b", "a": 1}]), COLUMNS % ("question、answer", "a、think、问")),
    ("columns.csv", "question,output\n问,答\n", COLUMNS % ("think、answer", "output、question")),
    ("columns.parquet", as_parquet({"think": ["t"], "x": ["x"]}), COLUMNS % ("question、answer", "think、x")),
    ("one.jsonl", as_jsonl(make_rows(1)), TOO_FEW % (1, 1, "训练集")),
    (
        "bad.jsonl",
        as_jsonl([make_row(1, think="")] * 9),
        TOO_FEW % (9, 0, "训练集") + "\n  think 为空：9 行（第 1、2、3、4、5 等 行）",
    ),
    ("equal.jsonl", as_jsonl([make_row(1)] * 10), TOO_FEW % (10, 1, "验证集") + EQUAL),
    ("quote.csv", f'{HEAD}q,"t,a\nq,t,a\n', CSV % "~"),
    ("comma.csv", f"{HEAD}q,t,a\nq,t,a,b\n", CSV % "~"),
    ("commas.csv", HEAD + "q,t,a,b\n" * 20, CSV % "第 1 行数据比表头多出字段"),
    ("words.parquet", "words", PARQUET),
    ("cut.parquet", as_parquet(dict.fromkeys(rows.FIELDS, ["q"]))[:-9], PARQUET),
    ("gbk.parquet", as_parquet(dict.fromkeys(rows.FIELDS, ["我".encode("gbk")])), PARQUET),
    ("nonsense", None, NEITHER),
    ("a/b/c", None, NEITHER),
    ("n" * 300, None, NEITHER),
]


@pytest.mark.parametrize("name, content, message", ERRORS, ids=[name[-20:] for name, _, _ in ERRORS])
def test_unusable_source_ends_with_its_remedy_and_writes_nothing(fails, name, content, message):
    if content is ...:
        Path(name).mkdir()
    elif isinstance(content, Path):
        Path(name).symlink_to(content)
    elif content is not None:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    fails(message.replace("{}", name).replace("[]", Path(name).suffix), "--dataset", name)


ODD = {  # what looks wrong and is fine: how the 20 good rows are written, and the rows that come of it
    "byte order mark": lambda: b"\xef\xbb\xbf" + GOOD.encode(),
    "CRLF": lambda: GOOD.replace("\n", "\r\n").encode(),
    "mark and CRLF": lambda: b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode(),
    "no line end at the end": lambda: GOOD.rstrip("\n").encode(),
    "empty lines": lambda: GOOD.replace("\n", "\n\n \n").encode(),
    "all escaped": lambda: "".join(json.dumps(row) + "\n" for row in make_rows(20)).encode(),
    "other fields, nested": lambda: GOOD.replace("{", '{"metrics": {"f1": [1e400, {}]}, ').encode(),
    "spaces around": lambda: GOOD.replace("。", "。\\u3000 ").encode(),
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_odd_file_gives_the_same_rows(content):
    Path("odd.jsonl").write_bytes(content())
    data.prepare("odd.jsonl")
    assert written() == published(make_rows(20))


@pytest.mark.parametrize("text", ["空\0字", "<|im_end|>", "思" * 17_000_000], ids=["NUL", "control token", "50 MB"])
def test_odd_text_is_kept_as_it_is(text):
    rows = [*make_rows(19), make_row(20, think=text)]
    data.prepare(save(rows, "odd.jsonl"))
    assert written() == published(rows)


def test_question_may_speak_of_the_tags():
    rows = [*make_rows(19), make_row(20, question="<think> 是什么？")]
    data.prepare(save(rows, "odd.jsonl"))
    assert written() == published(rows)


def test_link_to_a_file_is_read_and_stays_a_link():
    save(make_rows(20), "rows.jsonl")
    Path("link.jsonl").symlink_to("rows.jsonl")
    data.prepare("link.jsonl")
    assert written() == published(make_rows(20)) and Path("link.jsonl").is_symlink()


@pytest.mark.parametrize(
    "flag, name, status, message",
    [
        ("--dataset", "missing.csv", 1, f"错误：{MISSING}"),
        ("--dataset", "cut.jsonl", 1, f"错误：{JSON % (1, 'Expecting value，第 14')}"),
        ("--dataset", "nonsense", 1, f"错误：{NEITHER}"),
        ("--datasets", "rows.csv", 2, "data.py: error: unrecognized arguments: --datasets {}"),
        ("--data", "rows.csv", 2, "data.py: error: unrecognized arguments: --data {}"),  # no flag can be shortened
    ],
)
def test_script_fails_with_one_sentence(folder, flag, name, status, message):
    Path("cut.jsonl").write_text('{"question": ')
    result = run_script("data.py", flag, name, cwd=folder)
    assert result.returncode == status
    before, found, after = result.stdout.partition(message.replace("{}", name))
    assert found and after == "\n" and (before.startswith("usage: data.py") if status == 2 else before == "")
    assert list(contents(folder)) == ["cut.jsonl"]


def test_help_names_flags_and_defaults(folder):
    result = run_script("data.py", "--help", cwd=folder)
    assert result.returncode == 0
    for flag, default in [("dataset", data.DATASET_NAME), ("train_file", "train.jsonl"), ("val_file", "val.jsonl")]:
        assert re.search(rf"--{flag} [^-]*\(default:\s+{default}\)", result.stdout)


@pytest.fixture
def hub(tmp_path_factory):
    """A hub with one set under two names; its files are those in `.set`."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "README.md").write_text("# 说明", encoding="utf-8")
    with Hub(datasets={"owner/name": folder, data.DATASET_NAME: folder}) as server:
        server.set = folder
        yield server


def download(hub: Hub, folder: Path, *flags: str):
    """Run data.py in work/; the client stores what it downloads beside it."""
    Path("work").mkdir(exist_ok=True)
    return run_script("data.py", *flags, cwd=folder / "work", env=hub.env(folder / "home"))


META = {"dataset_infos.json": [{}], "configuration.json": [{}]}
SETS = [  # the name that is asked for, the files of the set, those that are taken
    ("", META | {"medical_r1.jsonl": make_rows(2407)}, "medical_r1.jsonl"),
    ("owner/name", META | {"rows.json": make_rows(20)}, "rows.json"),
    ("owner/name", {"all.csv": make_rows(20), "all.jsonl": make_rows(20)}, "all.jsonl"),
    ("owner/name", {"b.jsonl": make_rows(20, first=11), "a.jsonl": make_rows(10)}, "a.jsonl、b.jsonl"),
]


@pytest.mark.parametrize("name, files, taken", SETS, ids=["default", "no metadata", "one format", "two parts"])
def test_set_is_downloaded_with_its_data_files_in_the_order_of_their_names(hub, folder, name, files, taken):
    for file, rows in files.items():
        save(rows, hub.set / file)
    result = download(hub, folder, *(["--dataset", name] if name else []))
    assert result.returncode == 0, result.stdout
    rows = make_rows(20 if name else 2407)
    assert f"\n数据来源  {name or 'krisfu/delicate_medical_r1_data'}（{taken}）：共 {len(rows)} 行\n" in result.stdout
    assert written(folder / "work") == published(rows)


def test_file_that_the_hub_has_renamed_is_not_read_twice(hub, folder):
    save(make_rows(20), hub.set / "old.jsonl")
    assert download(hub, folder, "--dataset", "owner/name").returncode == 0
    (hub.set / "old.jsonl").rename(hub.set / "new.jsonl")
    assert "owner/name（new.jsonl）：共 20 行" in download(hub, folder, "--dataset", "owner/name").stdout


AGAIN = "请检查名称和网络后重试同一命令，或用环境变量 MODELSCOPE_ENDPOINT 换一个镜像，或用 --dataset 指定本地文件。"
LOADING = "无法从 {url} 下载数据集 {name}（~）；" + AGAIN
NO_FILES = "数据集 {name} 里没有 .jsonl、.json、.csv 或 .parquet 文件；请用 --dataset 换一个。"


@pytest.mark.parametrize(
    "name, stopped, message",
    [("owner/name", False, NO_FILES), ("owner/unknown", False, LOADING), ("owner/name", True, LOADING)],
    ids=["no data file", "unknown set", "connection refused"],
)
def test_failed_download_ends_with_one_sentence_and_leaves_old_files(hub, folder, name, stopped, message):
    if stopped:
        hub.__exit__()
    data.prepare(save(make_rows(20), "rows.jsonl"), "work/train.jsonl", "work/val.jsonl")
    old = contents(folder / "work")
    result = download(hub, folder, "--dataset", name)
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert says(result.stdout.splitlines()[-1], message.format(url=hub.url, name=name)), result.stdout
    assert contents(folder / "work") == old


def test_examples_are_the_rows_that_were_written():
    data.prepare(save(ROWS[-5:] + make_rows(20), "rows.csv"))
    assert (data.read_examples("train.jsonl"), data.read_examples("val.jsonl")) == written()
    by_hand = save([make_row(1, think=" 思考1。\\n")], "val.jsonl")
    assert data.read_examples(by_hand) == [make_row(1)]  # cleaned like the others


@pytest.mark.parametrize("line, problem", BAD.items(), ids=lambda value: value[:60])
def test_unusable_example_is_named_with_file_and_line(line, problem):
    Path("val.jsonl").write_text(f"{as_jsonl(make_rows(2))}\n{line}\n", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        data.read_examples("val.jsonl")
    assert says(str(ended.value), f"val.jsonl 第 4 行 {problem}；请用 python data.py --dataset <原始数据> 重新生成。")
