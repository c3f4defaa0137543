"""Traces of how a thinking was made, found and left out. Its writer was shown the question, a hidden
instruction and the finished answer: traces of that teach a model to cite what nobody gave it, and in a reply
they are the sign that it learnt to. They are found by the language's own patterns; whether what is thought is
right, this file does not know."""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from parts.rows.row import LocatedRows, Problems, all_questions
from parts.terminal import progress

KINDS = {  # kind -> for people
    "answer": "提到给定的答案",
    "process": "说到写思考过程",
    "doctor": "把提问的人当作医生",
    "two": "把一个问题当作两个",
    "covert": "把问题里没有的说成用户提到的",
}


class Trace(NamedTuple):
    kind: str  # one of KINDS
    start: int  # where it begins in the thinking, in characters
    end: int


# ---- what is found -----------------------------------------------------------------------------------------
# 答案 that somebody gave, by its name; and what is done with it, and what it does.
GIVEN = (
    "(?:(?:提供|给定|附带|[已现原]有|先前|用户给)的?|(?:之前|原来)的"
    "|(?:用户|题目)(?:[里中]?的)?|问题[里中]的?)答案"
)
USED = "(?:根据|按照|依据|围绕|对照|参照|核对|检查|结合|照着?)"
SAYS = (
    "(?:提到|提及|指出|强调|列[出了]|认为|建议|给出[了的]|采用|涉及|解释了"
    "|(?:包含|涵盖|覆盖)了|[用讲说写][了着的])"
)
# Words for an answer, which is a trace or the reply that is planned: is_planned tells.
ANSWER = re.compile(
    "答案|(?:提供|给出|给定|参考|标准)的?(?:回答|回复)"
    # What stands in front is looked at last, so that re.search passes quickly over what begins none of these.
    "|回答(?<!的回答)(?=[里中]?(?:已经|已)?(?:提到|指出|列出|给出|涵盖)[了的])"
)
# "根据提供的答案", "答案里已经提到": who writes so was shown one, and every ANSWER is looked at.
SHOWN = re.compile(
    rf"{GIVEN}|(?:用户|题目)[^，。]{{0,6}}(?:给出|提供)了答案|{USED}答案(?!选)"
    rf"|[与和跟]答案[^，]{{0,8}}(?:一致|相符|吻合)|(?:答案|回答)[里中](?:还|也|已经?|没有?)*(?:{SAYS}|说|的)"
    rf"|答案(?:部分)?(?:还|也|已经?|主要|没有?)*{SAYS}|看答案|答案已经?(?![很呼])"
)
# 答案 as the reply that is planned, or as the conclusion that is being reached: by what stands around it.
BEFORE_PLANNED = re.compile(
    "(?:(?<!已经)(?<!已)(?<!用户)给出|得[到出]|组织|整[理合]|总结|形成|写出?|提供|完善|构[建思]|准备|找[到出]"
    "|选[择出]|知道|确保|保证|[使让成]|[会要将]在|一个|整个|这样的?|希望"
    "|(?:最终|直接|完整|[正准明]确|清晰|可能|合适|简洁|我|问题)的)(?:最终|正确|准确)?$"
)
AFTER_PLANNED = re.compile(
    "(?:[里中]|部分|的?(?:结构|重点|内容|开头))?(?:[也还就]|最后|可能|首先)*"
    "(?:不?需要(?!确认|核对)|不?应该?(?!当)|应当|必须|不?要(?!求)|不?可以|不[必用能够]|最好|再|先|[：:]"
    "|是(?:不是|否|什么|哪|[A-E]))(?!没|已|是?(?:正确|合理|对的)|不?会)"
    "|(?:[也就便]|其实|应该?|很?可能|大概|似乎)*"
    "(?:是|为|选|在于|取决于|指向|不?复杂|很?简单|很?(?:明确|清楚|明显)[了的])"
    "(?!正确|合理|对的|准确|完整|按|怎|如何|从|由|基于|参考)"
)
# Somebody's 答案 all the same: it is compared, or it is found good; unless that is what the reply is to be.
JUDGED = re.compile(
    rf"{GIVEN}|(?<!确保)(?<!保证)答案[里中]?(?:可能|应该|确实|[是都]|已经?)*"
    "(?:正确|合理|没问题|足够|有误|错误|对的|(?:覆盖|涵盖)了)"
    "|(?<!确保)(?<!保证)答案[里中]?的(?!结构|准确|完整|语言|逻辑|重点|开头|每)"
    "|(?:确保|保证)答案[里中]?的(?:要点|关键|信息|内容|建议|例子|数据|描述)"
    rf"|(?:{USED}|因为|符合|对应|参考|基于|分析|已?知道?)[^，]{{0,8}}答案"
)
# 思考过程 is what the writer had been told to write; that of others, 诊断的思考过程, is medicine.
PROCESS = re.compile(
    "(?=[思推内])"  # what all of it begins with: the rest is tried at few characters
    "(?<![^我己整细晰贯然个们谨理体确能]的)(?<!临床)(?<!分析)"
    "(?:(?:思考|推理|思维|思路)的?(?:过程|步骤|链条?)(?!障碍|紊乱|异常)|(?:思考|推理)(?:部分|内容|流程|路径)"
    "|内心独白|(?<=在)(?:思考|推理)(?=[中时里])|(?<=展开)思考|(?:思考|推理)(?=时(?:要|可以|需要)))"
)
# "用户是医生" of an asker who did not say so (ASKS_AS_DOCTOR); 用户的父亲是医生 is about somebody else.
A_DOCTOR = "(?:医生|医师|大夫|护士|医[务护疗](?:工作者|从业者|人员))"
DOCTOR = re.compile(
    rf"用户(?!的[家父母孩朋妻丈同])[^，。、]{{0,6}}(?:是|作为|身为)"
    rf"[^在向来想问找让被听看请咨，。、]{{0,6}}{A_DOCTOR}(?![的给让开说建推诊告指处没])"
    rf"|作为一?[名位个]?{A_DOCTOR}[，的]?用户|用户[^，。]{{0,6}}{A_DOCTOR}”?的?"
    rf"(?:身份|口吻|在[提学询]?[问习])|{A_DOCTOR}”?的?称呼|(?:提到|还有)(?:一[名位个])?{A_DOCTOR}[在想也]"
)
ASKS_AS_DOCTOR = re.compile(rf"(?:[我人][^，。]{{0,6}}是|作为)[^，。]{{0,8}}{A_DOCTOR}")
# Two questions where there is one: the question, and the instruction that the asker never saw.
TWO = re.compile(
    "两[个次遍][^，。]{0,6}(?:相同|一样|重复|类似|相似|同样)的?(?:问题|提问)|问同样的问题"
    "|用户[^，。]{0,6}(?:第二个|另一个|[有发提]了?两个)(?:问题|要求)"
    "|(?:问题|提问)[里中]?(?:的|其实|实际上|有|分[为成]?|包[含括]){1,3}这?两个?(?:部分|方面|问题|小问题)"
)
SEVERAL = re.compile(
    "[？?].|以及|并且?[^，]|同时|另外|还有|，[^，]*(?:如何|怎么|为什么|哪些|什么|吗)[^，]*，|和|与"
)
# "The user mentioned X", which is fine where X is in the question.
MENTIONED = re.compile(
    "(?:用户|患者|问题|题目|题干)(?:的?(?:问题|描述))?[里中]?(?:还|也|已经?|又|特别|之前|最后|另外|明确)*"
    "(?:提到|提及|指出|列出|强调|问到|说到|描述|要求)[过了]?(?:的(?!是))?"
    "(?!自己|[他她其父母爷奶家我]|孩子|“?医生)([^，。！？；：\n]{2,})"
)
# Where in 用户提到的X是Y the X ends.
PREDICATE = re.compile("(?<=..)(?:可能|应该|确实|属于|符合|对应|提示|指的|需要|[是都会就])")
# kind -> (its pattern, what in the question makes it none)
PATTERNS = {"two": (TWO, SEVERAL), "process": (PROCESS, PROCESS), "doctor": (DOCTOR, ASKS_AS_DOCTOR)}


@lru_cache(maxsize=8)  # a row's question and answer are asked for at each match
def bigrams(text: str) -> set[tuple[str, str]]:
    """Return the pairs of neighbouring characters, punctuation left out."""
    # NFKC makes H2 of H₂ and half-width letters of full-width ones: texts have either.
    return set(pairwise(re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text).lower())))


def share_in(text: str, pairs: set[tuple[str, str]]) -> float:
    """Return which share of these bigrams a text has."""
    return len(pairs & bigrams(text)) / len(pairs)


def is_covert(match: re.Match, question: str, answer: str, instruction: str) -> bool:
    """Tell whether what the asker is said to have mentioned, by a match of MENTIONED, is in the answer or the
    instruction, not in the question. 情况 or 症状 is nothing in particular."""
    mentioned = match[1]
    if match.string[match.start(1) - 1] == "的":
        mentioned = PREDICATE.split(mentioned)[0]
    pairs = bigrams(mentioned)
    if len(pairs) < 2:
        return False
    in_question = share_in(question, pairs)
    in_others = max(share_in(answer, pairs), share_in(instruction, pairs))
    # By words, as nobody repeats another's text to the letter; both limits were tried on published rows.
    return in_question < 0.5 and in_others - in_question >= 0.3


def is_planned(text: str, match: re.Match) -> bool:
    """Tell whether a match of ANSWER in `text` is the reply that is planned, by the clause around it."""
    # 60 characters of a clause are enough, and bound the time for a text without punctuation.
    before = re.split("[，。；：！？\n]", text[max(match.start() - 60, 0) : match.start()])[-1]
    after = re.compile("[^，。；！？\n]{0,60}").match(text, match.end())[0]
    if match[0] != "答案" or JUDGED.search(before + match[0] + after):
        return False
    return bool(BEFORE_PLANNED.search(before) or AFTER_PLANNED.match(after))


def find(think: str, question: str, answer: str = "", instruction: str = "") -> list[Trace]:
    """Return the traces in a thinking, in order, without overlaps. `answer` is what followed it,
    `instruction` what its writer was told beside the question. Where none was shown, 答案 is no trace."""
    traces = []
    for kind, (pattern, unless) in PATTERNS.items():
        if not unless.search(question.rstrip("？?。")):
            for match in pattern.finditer(think):
                traces.append(Trace(kind, *match.span()))
    # Who was told more than the question was shown an answer. An exam's question speaks of 答案 itself.
    answers = [] if "答案" in question else list(ANSWER.finditer(think))
    if answers and (instruction or SHOWN.search(think)):
        for match in answers:
            if not is_planned(think, match):
                traces.append(Trace("answer", *match.span()))
    for match in MENTIONED.finditer(think):
        if not match[1].startswith("答案") and is_covert(match, question, answer, instruction):
            traces.append(Trace("covert", match.start(), match.start(1)))
    # Who marks them in a text, or cuts them out, wants none inside another.
    apart = []
    for trace in sorted(traces, key=lambda trace: trace.start):
        if not apart or trace.start >= apart[-1].end:
            apart.append(trace)
    return apart


# ---- leaving out: sentences, clauses, and how they hang together -------------------------------------------
MIN_REMAINING = 0.6  # share of a thinking's characters below which its row is not worth training on
TOO_LITTLE = f"清理答案泄露后，剩下的思考不到 {MIN_REMAINING:.0%}"
# A line number, "1. ", ends no sentence; ". " and ", " of English do what 。 and ， do.
SENTENCE = re.compile(
    r"((?:[^。！？；\n.!?“（]+|“[^”\n]{0,120}”|（[^）\n]{0,160}）|(?!(?<!\d)[.!?]\s)[^。！？；\n])*"
    r"(?:[。！？；]+[”’）]*|[.!?](?:[^\S\n]+|(?=\n)))?)(\n*)"
)
CLAUSE = re.compile(r"(?:“[^”]{0,120}”|（[^）]{0,160}）|(?!, )[^，：])+(?:[，：]|, |$)|[，：]|, ")
END = re.compile(r"[。！？；.!?][”’）]*\s*$")
# Clauses that say nothing by themselves: a connective, the name of a topic, a source.
LEAD = re.compile(
    r"[-*#\d.、\s]*(?:另外|此外|但是?|然后|接下来|接着|最[后终]|同时|总之|总结(?:一下|下来|起来)?|首先|其次"
    "|第[一二三四五六]|[比例]如|所以|因此|[而并]且|还有|需?要注意|因为|虽然|现在|嗯|可能|当然|好的|对了|那么?"
    f"|是的|不对|另?一方面|(?:但是?|不过)?(?:{USED}[^，]*)?"
    "|[^，。！？；]{0,12}(?:方面|问题|来[说看]|而言|部分|时候?|之[前后]|[后中里]|情况下))[，：。；]?$|.*：$"
)
# Clauses that want another one behind them.
OPENS = re.compile(
    "[^，]{0,3}(?:如果|虽然|尽管|即使|假[如设]|既然|由于|除了|无论"
    "|不[管仅但只]|与其|只[有要]|当|因为|一方面|一是)"
)
# A clause with a trace that only says where the next one comes from, which then is worth keeping; unless that
# is about the trace all the same.
INTRODUCES = re.compile(
    rf"\s*(?:但是?|不过|而|所以|因此|然后)?(?:(?:{USED}[^，]*|[在作][^，]*(?:[中里时]|过程))，(?!"
    "(?:可能|还|也)?(?:已|没|里面|其中|都|[它这那]|并没|不需要|用户(?:已|没))|[^，。]{0,12}(?:提到|没有?提))"
    "|(?:总结|整理)?(?:一下|下来)?(?:思考|推理)[^，]{0,6}：(?=先|首先|第一|从|需要|要|应该|我))"
)
# Behind the traces a sentence goes on with what the writer thinks himself: 但需要详细展开.
GOES_ON = re.compile("(?:但|不过)(?:[还也我仍]|可能)*(?:需要|应[该当]|[要得更]|根据|还有|用户的问题)(?!是)")
# Sentences that rest on the one before, and connectives without which they may stand.
POINTS = re.compile(
    r"\s*(?:[而但]|不过|所以|可能)?(?:这(?!个问题|位|类患者|个时候)|那(?!么)|[它其该即]|此(?!外)|上述"
    "|[前后两二]者|是的|对，|否则|看起?来|都(?!要|需)|也就是|里面|甚至|尤其|特别是"
    "|[比例]如(?!.*(?:是|会|可以|可能|需要)))"
)
BACK = re.compile("[这那](?:[些两几三四五点样种里]|个结构|个顺序)|上述|两者")
CONNECTS = re.compile("^(?:(?:但是?|不过)也?|因此|所以|[而并]且|同时|因为|而|[比例]如)，?(?=.{4})")


def remove_traces(question: str, think: str, answer: str, instruction: str = "") -> tuple[str, Counter]:
    """Return (the thinking without traces, how many of each kind there were). Nothing is put in their place.
    Without any it comes back as it was, character for character; what comes back does not change again."""
    traces = find(think, question, answer, instruction)
    counts = Counter(trace.kind for trace in traces)
    while traces:  # once or twice: what went may have hidden another
        think = cut_traces(think, traces)
        traces = find(think, question, answer, instruction)
    return think, counts


def cut_traces(think: str, traces: list[Trace]) -> str:
    """Return the thinking without the clauses that hold these traces, and without what cannot stand then."""
    starts = [trace.start for trace in traces]
    pieces, gap, paragraph_stands = [], "", False
    for match in SENTENCE.finditer(think):
        sentence, breaks = match.groups()
        inside = traces[bisect_left(starts, match.start(1)) : bisect_left(starts, match.end(1))]
        if inside:
            sentence, gap = cut_sentence(sentence, match.start(1), inside)
        elif gap and sentence.strip():
            # After a gap: what rests on what has gone goes too.
            if POINTS.match(sentence) or gap == "all" and BACK.search(CLAUSE.match(sentence)[0]):
                sentence = ""
            else:
                sentence, gap = CONNECTS.sub("", sentence), ""
        pieces.append(sentence)
        paragraph_stands = paragraph_stands or bool(sentence.strip())
        if breaks:
            # A paragraph of which nothing is left goes with its line breaks.
            pieces.append(breaks if paragraph_stands else "")
            paragraph_stands = False
    return "".join(pieces).rstrip()


def cut_sentence(sentence: str, start: int, traces: list[Trace]) -> tuple[str, str]:
    """Return (what is left of a sentence, on what of it the next one cannot rest: "all", its "end" or "").

    It begins at `start`. The clauses go in which these traces begin; what stands before them stays, what goes
    on after them, or both.
    """
    clauses = CLAUSE.findall(sentence)
    ends = list(accumulate(map(len, clauses)))
    first = bisect_right(ends, traces[0].start - start)
    last = bisect_right(ends, traces[-1].start - start)
    head, tail = clauses[:first], clauses[last + 1 :]
    if not (tail and INTRODUCES.match(clauses[last] + tail[0])):
        while tail and not GOES_ON.match(tail[0]):
            tail.pop(0)
    if tail and not (head and OPENS.match(head[-1])):
        if all(map(LEAD.match, head)):
            tail[0] = CONNECTS.sub("", tail[0])
        return "".join(head + tail), ""
    while head and (OPENS.match(head[-1]) or LEAD.match(head[-1])):
        head.pop()  # it is nothing without the end of the sentence
    text, end = "".join(head), END.search(sentence)
    # Of a question the part that was asked may have gone.
    if not text or end and end[0][0] in "？?":
        return "", "all"
    return re.sub("(?:[，：]|, )$", "", text) + (end[0] if end else ""), "end"


def clean_rows(rows: LocatedRows, problems: Problems, counts: Counter) -> LocatedRows:
    """Return the rows with what is left of their thinking. `problems` gathers those of which too little is
    left, `counts` what was done. A row's `instruction` is what its writer was told beside the question."""
    cleaned = []
    for location, row in progress(rows, "清理"):
        before, instruction = row["think"], row.get("instruction", "")
        # What was said in earlier turns was said: a thinking that speaks of it cites no hidden answer.
        think, kinds = remove_traces(all_questions(row), before, row["answer"], instruction)
        counts.update(kinds, rows=1, changed=think != before, before=len(before), after=len(think))
        if len(think) < MIN_REMAINING * len(before):
            problems.setdefault(TOO_LITTLE, []).append(location)
        else:
            cleaned.append((location, row | {"think": think}))
    return cleaned


def describe_cleaning(counts: Counter) -> str:
    """Return what clean_rows did, for people."""
    share = f"{(counts['after'] or 1) / (counts['before'] or 1):.1%}"  # of no characters, all
    text = f"{counts['changed']}/{counts['rows']} 行的思考改过，保留 {share} 的字"
    kinds = [f"{name} {counts[kind]} 处" for kind, name in KINDS.items() if counts[kind]]
    return f"{text}；去掉的：{'，'.join(kinds)}" if kinds else text
