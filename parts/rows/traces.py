"""Traces of how a thinking was made, found and left out. Whoever wrote it was shown the question, a hidden instruction
and the finished answer, and it shows: in data it teaches a model to cite what nobody gave it, in a reply it is the sign
that it learnt to. Finds them by the language's own patterns; does not know whether what is thought is right."""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from itertools import accumulate
from typing import NamedTuple

from parts.rows.row import Place, Placed

KINDS = {  # kind -> for people
    "answer": "提到给定的答案",
    "process": "说到写思考过程",
    "doctor": "把提问的人当作医生",
    "two": "把一个问题当作两个",
    "covert": "把问题里没有的说成用户提到的",
}


class Trace(NamedTuple):
    kind: str  # one of KINDS
    start: int  # its place in the thinking, in characters
    end: int


# 答案 that somebody gave: 提供的答案, 原答案, 题目中的答案. And what means the same without the word.
GIVEN = (
    r"(?:(?:用户|题目|问题|系统|对方|资料|原文)(?:的问题)?(?:里|中)?)?(?:所|已经|已)?"
    r"(?:提供|给出|给定|附带|给|提到|列出|已有|已知|现有|之前|先前|原有|原始|原|上述|参考|标准|正确|该|这个|那个|这份|那份|此|的){0,4}"
)
ANSWER = re.compile(
    rf"(?:{GIVEN}答案|(?:用户)?(?:提供|给出|给定|给我?|已有|参考|标准|原)的?(?:参考)?(?:回答|回复)"
    r"|(?<!的)(?:之前的|上面的|这个|那份)?回答(?=(?:里|中)?(?:已经|已)?(?:提到|提及|指出|列出|给出|涵盖)(?:了|的)))"
)
# Only what somebody gave can be spoken of so.
SOMEBODYS = re.compile(
    r"(?:提供|给定|附带|已有|现有|先前|原有|原始|用户给)的?答案|(?:用户|题目)(?:的|里的|中的)?答案|问题(?:里|中)的?答案|(?:提供|给定|给我?)的回答|(?:题目|系统)给(?:出)?的答案"
)
SHOWN = re.compile(
    rf"{SOMEBODYS.pattern}|(?:答案|回答)(?:里|中|部分)(?:还|也|已经|已|主要|所)?(?:提到|说|给出|列出|没有提到|没提到|解释|建议|的)"
    r"|答案(?:里|中|部分)?(?:还|也|并|已经?|最后|主要|只|特别)*(?:没有?|未)?(?:明确)?"
    r"(?:提到|提及|指出|强调|列出|列了|说(?!明)|写[了着的]|认为|建议|给出[了的]|采用|用[了的]|讲|涉及|解释了|概括|包含了|涵盖了|覆盖了)"
    r"|答案(?:里|中)(?!也?还?(?:应|需要|要|可以|可能(?:不|需|会)|必须|最好|不|再|加|先))|(?:之前|原来|已给出|我手头)的答案|答案(?:已经|已)(?!很|呼)"
    r"|(?:从|对照|看|回顾)(?:一下|看)?(?:给出的|这个)?答案(?!选)|(?:用户|题目|系统)[^，。]{0,6}(?:给出|提供)了答案"
    r"|(?:根据|按照|依据|围绕|对照|检查|看|看看|核对|结合|照|照着)答案(?!选)|(?:与|和|跟)答案(?:中的[^，]{0,6})?(?:保持)?(?:一致|相符|吻合)"
)
# 答案 as the reply that is planned, or as the conclusion that is being reached: not a trace.
BEFORE_PLANNED = re.compile(
    r"(?:(?<!已经)(?<!已)(?<!用户)给出|得到|得出|组织|整理|整合|总结|归纳|形成|写出|写|提供|完善|呈现|构建|构思|准备|找到|找出|寻找|选择|选出"
    r"|验证|确认一下|知道|想要|确保|保证|使|让|成|放在|直接给|(?:会|要|可以|应该|将)在"
    r"|的?(?:直接|完整|最终|正确|准确|合适|清晰|全面|可能|明确|简短|简洁|最佳|合理|靠谱|统一)的|我的|问题的|整个|一个|这样的?|这样的话|希望|检查一遍|(?:具体|有用|简单|详细|更好|有条理)的|最[后终]的?)"
    r"(?:正确|最终|最佳|准确)?$"
)
AFTER_PLANNED = re.compile(
    r"^(?:里|中|部分|的?(?:结构|重点|内容|开头|最后|末尾|语言|篇幅|字数|语气))*(?:也|还|就|最后|可能|或许|大概|首先|主要|应)*"
    r"(?:不?需要(?!确认|核对)|不?应该|应当|应(?=[^该当])|必须|不?要(?!求)|不?可以|得先|不必|不用|不能|不宜|最好|再|先(?![^，]{0,4}了)|加|补充|可能会|控制|提醒|尽量|会更|太|过于|不够"
    r"|是(?:不是(?!漏)|否|什么|多少|哪|[A-EＡ-Ｅ])|[：:])(?!没|足够|已|是?(?:正确|合理|对的|准确)|覆盖了|不?会)"
    r"|^(?:也|就|便|其实|显然|自然|应该|应|可能|很可能|大概|似乎|看来|并)*"
    r"(?:是(?!不是)|为(?!什么)|选(?!择了|用了|的是)|在于|取决于|因人而异|显而易见|呼之欲出|指向|不?复杂|不难|很?简单|(?:很|更|也|就)*(?:明确|清楚|明显|明了|一目了然)(?:了|的))"
    r"(?!正确|合理|对的|准确|合适|完整|按|怎|如何|从|由|基于|参考|想|在说|希望|比较)"
    r"|^(?:的?(?:结构|逻辑|语言|内容|表述))?(?:既|要|都|就|比较|更)*"
    r"(?:简洁|准确|清晰|完整|全面|通顺|易懂|专业|正确|有条理|符合医学|科学|通俗)(?!的)"
    r"|^(?:选项|的结构$|的时候)"
)
# Somebody's 答案 all the same: it is compared, or it is found good.
JUDGED = re.compile(
    r"答案(?:里|中|部分|内容)?(?:可能|应该|确实|基本|是|都|已经|已|整体)*"
    r"(?:的(?!结构|准确|完整|语言|逻辑|重点|开头|篇幅|字数|语气|末尾|最后|时候)|正确|合理|合适|没问题|没有问题|足够|可以接受|有误|错误"
    r"|覆盖了|全面了|涵盖了|对的|写好|给出|有了)|(?:与|和|跟|同)[^，]{0,8}答案[^，]{0,4}(?:一致|相符|吻合|对应)|(?:已经|已|早就)知道答案"
    r"|(?:已知|既然|因为|符合|对应|参考|核对|对照|依据|根据|按照|照着|基于|围绕|分析|检查|结合)[^，]{0,8}答案"
)
SURE = re.compile(  # it is the reply that is to be good, unless what is in it is there already
    r"(?:确保|保证)答案(?!(?:里|中|部分)*的?(?:要点|关键|重点|信息|内容|建议|例子|数据|描述|这?几?点)|[与和跟同])"
)
# 思考过程 is what the writer had been told to write; that of others, 诊断的思考过程, is medicine.
PROCESS = re.compile(
    r"(?<![^我己整细晰贯然个们谨理体确能]的)(?<!临床)(?<!分析)(?:"
    r"(?:写|输出|生成|补全|展示|转化为)(?:一段|出|下|我的|详细的|自然的){0,2}(?:思考|推理|内心独白)(?:的?(?:过程|步骤|形式))?"
    r"|(?:思考|推理|思维|思路|分析思考)的?(?:过程|步骤|链条?)(?!障碍|紊乱|异常)"
    r"|(?:思考|推理)(?:部分|内容|流程|路径|思路|框架)|推导过程|内心独白|我的思考(?=应|需要|要|必须)"
    r"|(?<=在)(?:思考|推理)(?=[中时里])|(?<=展开)思考|(?:思考|推理)(?=时(?:也|要|可以|需要|应|集中|注意)))"
)
A_DOCTOR = r"(?:医生|医师|大夫|医务人员|医务工作者|医护人员|医疗(?:工作者|从业者|从业人员|专业人士|行业的人|人员)|护士)"
ASKER = r"(?:用户(?!的(?:家|父|母|孩|朋|妻|丈|同))|提问者|提问的人|对方)"
DOCTOR = re.compile(
    rf"{ASKER}[^，。、]{{0,6}}(?:是|作为|自称|身为|(?<!因)为(?![什何了]))(?:(?![在向来想问找让被听看请咨，。、]).){{0,6}}{A_DOCTOR}"
    r"(?!的|给|让|开|说|建议|推荐|诊断|告|指|处|没)"
    rf"|作为(?:一?[名位个])?{A_DOCTOR}[，的]?{ASKER}|{ASKER}[^，。]{{0,6}}{A_DOCTOR}[”」]?的?(?:身份|称呼|口吻|在(?:提问|学习|问|询问))"
    rf"|[“「]?{A_DOCTOR}[”」]?的?称呼|(?:提到|还有)(?:一[名位个])?{A_DOCTOR}(?:在|想|也)|{ASKER}[^，。]{{0,6}}写了“{A_DOCTOR}”"
)
ASKS_AS_DOCTOR = re.compile(rf"(?:(?:我|本人)[^，。]{{0,6}}是|作为)[^，。]{{0,8}}{A_DOCTOR}")
# Two questions where there is one: the question, and the instruction that the asker never saw.
TWO = re.compile(
    r"(?:两个|两次|两遍|前后)[^，。]{0,6}(?:相同|一样|重复|类似|相似|同样)的?(?:问题|提问)"
    r"|(?:两个|两条|两次)(?:问题|提问)[^，。]{0,8}(?:相同|一样|重复|类似|一回事|一致)|重复(?:提问|了?问题|问了?)|问同样的问题"
    r"|(?:问题|提问)[^，。]{0,8}(?:(?:是|有|有些|有点|似乎|好像|出现了)?重复(?:的|了|，|。)|出现了?两[次遍])|问了两[次遍]"
    r"|问[^，。]{0,12}同一(?:个)?(?:意思|件事|回事)|其实是同一个意思|两种问法|两个版本的?(?:问题|提问)|(?:问题|提问)[^，。]{0,4}两个版本"
)
TWO_PARTS = re.compile(
    r"(?:问题|提问)(?:里|中)?(?:的|其实|实际上|有|分为?|分成|包含|包括){1,3}这?两个?(?:部分|方面|问题|小问题|块)"
    r"|用户[^，。]{0,6}(?:第二个|另一个)问题|用户[^，。]{0,4}(?:有|发了|提了)两个(?:问题|提问|要求)"
)
SEVERAL = re.compile(
    r"[？?].|以及|并且?[^，]|同时|另外|还有|及其|，[^，]*(?:如何|怎么|为什么|哪些|什么|吗)[^，]*，|和|与"
)
# "The user mentioned X", which is fine where X is in the question.
MENTIONED = re.compile(
    r"(?:用户|患者|问题|题目|题干)(?:的?(?:问题|描述))?(?:里|中)?(?:还|也|已经|已|又|特别|特意|所|之前|最后|只|另外|明确)*"
    r"(?:提到|提及|指出|列出|强调|问到|问了|问及|说到|描述|要求|说(?![明话法]))(?:过|了)?(?:的(?!是))?"
    r"(?!自己|他|她|其|父|母|孩子|爷|奶|家|我|医生|“医生)([^，。！？；：\n]{2,})"
)
COVERT = 0.3  # share of X in the question, at most, and by how much more of it is in the answer or the instruction


def bigrams(text: str) -> set[str]:
    """Pairs of neighbouring characters, punctuation left out."""
    text = re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text).lower())  # H₂ is H2
    return {text[i : i + 2] for i in range(len(text) - 1)}


def is_covert(match: re.Match, question: str, answer: str, instruction: str) -> bool:
    """Whether what the asker is said to have mentioned, by a match of MENTIONED, stands in the answer or the
    instruction, not in the question. Of 用户提到的X是Y it is X, and 情况 or 症状 is nothing in particular."""
    mentioned = match[1]
    if match.string[match.start(1) - 1] == "的":
        mentioned = re.split("(?<=..)(?:可能|应该|确实|属于|符合|对应|提示|指的|需要|[是都会就])", mentioned)[0]
    pairs = bigrams(mentioned)
    if len(pairs) < 2:
        return False
    in_question, *elsewhere = (len(pairs & bigrams(text)) / len(pairs) for text in (question, answer, instruction))
    more = max(elsewhere) - in_question
    return in_question <= COVERT <= more or in_question < 0.5 and more >= 0.35


def is_planned(text: str, match: re.Match) -> bool:
    """Whether a match of ANSWER in `text` is the reply that is planned, by the clause around it."""
    before = re.split("[，。；：！？\n]", text[max(match.start() - 60, 0) : match.end()])[-1]
    after = re.split("[，。；：！？\n]", text[match.end() : match.end() + 60], maxsplit=1)[0]
    colon = text[match.end() + len(after) : match.end() + len(after) + 1]
    if not match[0].endswith("答案"):
        return False
    if not BEFORE_PLANNED.search(before[:-2]) and not AFTER_PLANNED.search(after + colon):
        return False
    return bool(SURE.search(before + after) or not JUDGED.search(before + after))


def was_shown(think: str, question: str, instruction: str = "") -> bool:
    """Whether the writer of a thinking was, by what stands in it, shown an answer, or by its instruction at least told
    more than the question. A question that speaks of 答案 itself, as one of an exam does, tells nothing."""
    return "答案" not in question and bool(instruction or SHOWN.search(think))


def find(think: str, question: str, answer: str = "", instruction: str = "", shown: bool | None = None) -> list[Trace]:
    """The traces in a thinking, in order, without overlaps. `answer` is what followed it, `instruction` what its writer
    was told beside the question. `shown`: was_shown, where it is known; else an answer that was given is found only
    where that is beyond doubt."""
    shown = was_shown(think, question, instruction) if shown is None else shown
    patterns = [("two", TWO)]
    if not PROCESS.search(question + answer):
        patterns.append(("process", PROCESS))
    if not ASKS_AS_DOCTOR.search(question):
        patterns.append(("doctor", DOCTOR))
    if not SEVERAL.search(question.rstrip("？?。")):
        patterns.append(("two", TWO_PARTS))
    found = [Trace(kind, *match.span()) for kind, pattern in patterns for match in pattern.finditer(think)]
    for match in ANSWER.finditer(think) if re.search("答案|回答|回复", think) else ():
        if SOMEBODYS.search(match[0]) or shown and not is_planned(think, match):
            found.append(Trace("answer", *match.span()))
    for match in MENTIONED.finditer(think):
        if is_covert(match, question, answer, instruction):
            found.append(Trace("covert", match.start(), match.start(1)))
    apart, end = [], 0
    for trace in sorted(found, key=lambda trace: (trace.start, list(KINDS).index(trace.kind))):
        if trace.start >= end:
            apart.append(trace)
            end = trace.end
    return apart


# ---- leaving out: sentences, clauses, and how they hang together -----------------------------------------------------
SHORT = 6  # characters of a sentence below which it says nothing
KEPT = 0.6  # share of a thinking's characters below which its row is not worth training on
TOO_LITTLE = f"去掉痕迹后剩下的思考不到 {KEPT:.0%}"
# A line number, "1. ", ends no sentence; ". " and ", " of English do what 。 and ， do.
SENTENCE = re.compile(
    r"((?:“[^”\n]{0,120}”|（[^）\n]{0,160}）|(?!(?<!\d)[.!?]\s)[^。！？；\n])*"
    r"(?:[。！？；]+[”’）]*|[.!?](?:[^\S\n]+|(?=\n)))?)(\n*)"
)
CLAUSE = re.compile(r"(?:“[^”]{0,120}”|（[^）]{0,160}）|(?!, )[^，：])+(?:[，：]|, |$)|[，：]|, ")
END = re.compile(r"[。！？；.!?][”’）]*\s*$")
ASKS = re.compile("是否|吗|呢|吧|什么|哪|如何|怎|有没有|是不是|还是|多少|几")
BY = "(?:根据|按照|依据|基于|参考|参照|结合|依照|照着|对照)"
# Clauses that say nothing by themselves: a connective, the name of a topic, a source.
LEAD = re.compile(
    r"^[-*#\d.、\s]*(?:另外|此外|不过|但是?|然后|接下来|接着|最后|最终|同时|总之|总的来说|总体来说|总结(?:一下|下来|起来|来说|来看|的话)?|首先|其次|第[一二三四五六]"
    r"|比如|例如|所以|因此|而且|并且|还有|还要注意|需要注意|要注意|综合来看|因为|虽然|现在|记得|嗯|可能|当然|好的|对了|那么?|是的|不对|等等|再者?|另?一方面"
    rf"|[^，。！？；]{{0,12}}(?:方面|问题|来说|来看|而言|部分|时候?|之前|之后|后|中|里|情况下)|(?:但是?|不过)?{BY}[^，]*)?[，：。；]?$|.*：$"
)
# Clauses that want another one behind them, and clauses that only go on with the one before.
OPENS = re.compile(
    "^(?:[^，]{0,3}(?:如果|虽然|尽管|即使|假如|假设|既然|由于|除了|无论|不管|不仅|不但|不只|与其|只有|只要|当)|(?:但|不过|所以|而)?因为|一方面|一是)"
)
JOINS = re.compile("^(?:比如|例如|或|以及|包括|和|而且|并且|还有|如)")
# A clause with a trace that only says where the next one comes from; unless that is about the trace all the same.
INTRODUCES = re.compile(
    rf"^\s*(?:但是?|不过|而|所以|因此|然后)?(?:(?:{BY}[^，]*|(?:在|作为)[^，]*(?:中|里|时|过程))，"
    r"(?!(?:可能)?(?:已|没|里面|其中|都|它|这|那|还没|也没|并没|不需要|用户(?:已|没)|上面)|[^，。]{0,12}(?:提到|没有?提))"
    r"|(?:总结|整理|回顾)?(?:一下|下来)?(?:我的|整个)?(?:思考|推理|思维)[^，]{0,6}(?:应该是?|是)?：(?=先|首先|第一|从|需要|要|应该|我))"
)
BUT = re.compile("^(?:但是?|不过)，?")
GOES_ON = re.compile("^(?:但|不过)(?:可能|还|也|我|仍)*(?:需要|应该|应当|要|得|更|根据|还有|用户的问题)(?!是)")
# Sentences that rest on the one before, and connectives without which they may stand.
POINTS = re.compile(
    r"^\s*(?:所以|因此|而|但|不过|同时|另外|其中|可能|也许|或许)?，?(?:可能|也许)?(?:这(?!个问题|位|类患者|个时候)|那(?!么)|它|其|该|此(?!外)"
    r"|上述|以上|[前后]者|[两二]者|是的|对，|否则|看起来|看来|都(?!要|需)|也就是|里面|即|甚至|尤其|特别是|(?:比如|例如)(?!.*(?:是|会|可以|可能|需要)))"
)
BACK = re.compile("(?:这|那)(?:些|两|几|三|四|五|点|样|种|里|个结构|个顺序)|上述|两者")
CONNECTS = {
    "all": re.compile("^(?:(?:但是?|不过)也?|因此|所以|而且|并且|同时|因为|而|比如|例如)，?(?=.{4})"),
    "end": re.compile("^(?:比如|例如)，?(?=.{4})"),
}


class Rest(NamedTuple):
    """What is left of a sentence, and what went of it: "all", its "end", or something else, "", that no other sentence
    rests on."""

    text: str
    gone: str


def leave_out(question: str, think: str, answer: str, instruction: str = "") -> tuple[str, Counter]:
    """(the thinking without traces, how many of each kind there were). Nothing is put in their place. Without any it
    comes back as it was, character for character; what comes back does not change again."""
    shown = was_shown(think, question, instruction)
    found = find(think, question, answer, instruction, shown)
    counts = Counter(trace.kind for trace in found)
    while found:  # once or twice: what went may have hidden another
        think = cut(think, found)
        shown = shown or was_shown(think, question, instruction)
        found = find(think, question, answer, instruction, shown)
    return think, counts


def cut(think: str, found: list[Trace]) -> str:
    """The thinking without the clauses that hold these traces, and without what cannot stand then."""
    starts = [trace.start for trace in found]
    kept, gone = [], ""
    paragraph_stands = False
    for match in SENTENCE.finditer(think):
        sentence, breaks = match.groups()
        inside = found[bisect_left(starts, match.start(1)) : bisect_left(starts, match.end(1))]
        if inside:
            rest = cut_sentence(sentence, [trace._replace(start=trace.start - match.start(1)) for trace in inside])
        else:
            rest = after_gap(sentence, gone)
        gone = rest.gone if sentence.strip() else gone
        kept.append(rest.text)
        paragraph_stands = paragraph_stands or bool(rest.text.strip())
        if breaks:
            # A paragraph of which nothing is left goes with its line breaks.
            kept.append(breaks if paragraph_stands else "")
            paragraph_stands = False
    return "".join(kept).rstrip()


def cut_sentence(sentence: str, inside: list[Trace]) -> Rest:
    """The sentence without the clauses in which these traces begin: with what stands before them, what goes on after
    them, or both."""
    clauses = CLAUSE.findall(sentence)
    ends = list(accumulate(map(len, clauses)))
    first, last = (bisect_right(ends, trace.start) for trace in (inside[0], inside[-1]))
    head, tail = clauses[:first], going_on(clauses[last], clauses[last + 1 :])
    alone = all(map(LEAD.match, head))
    if {"doctor", "two"} & {trace.kind for trace in inside}:
        tail = []  # it rests on who is asking, or on the two questions
    if tail and (alone or not (OPENS.match(head[-1]) or BUT.match(clauses[last]) and tail[0] is clauses[last + 1])):
        if alone:
            tail[0] = BUT.sub("", tail[0])
        return Rest("".join(head + tail), "")
    head = standing(head)
    text, end = "".join(head), END.search(sentence)
    unasked = end and end[0][0] in "？?" and not ASKS.search(text)
    if not head or len(re.sub(r"\W", "", text)) < SHORT or unasked or sentence.endswith("："):
        return Rest("", "all")
    return Rest(re.sub("(?:[，：]|, )$", "", text) + (end[0] if end else ""), "end")


def going_on(trace_clause: str, rest: list[str]) -> list[str]:
    """Of the clauses behind one with a trace those that can do without it."""
    if rest and INTRODUCES.match(trace_clause + rest[0]):
        return rest
    for i, clause in enumerate(rest):
        if GOES_ON.match(clause):
            return rest[i:]
    return []


def standing(head: list[str]) -> list[str]:
    """The first clauses of a sentence, as many as are one when its end has gone."""
    end, waiting = 0, False  # 如果 waits for its main clause
    for i, clause in enumerate(head):
        if OPENS.match(clause):
            waiting = True
        elif not LEAD.match(clause) and not (waiting and JOINS.match(clause)):
            end, waiting = i + 1, False
    return head[:end]


def after_gap(sentence: str, gone: str) -> Rest:
    """A sentence without a trace, after one of which `gone` is gone: it may rest on that."""
    if not gone or not sentence.strip():
        return Rest(sentence, "")
    if POINTS.match(sentence) or gone == "all" and BACK.search(CLAUSE.match(sentence)[0]):
        return Rest("", gone)
    return Rest(CONNECTS[gone].sub("", sentence), "")


def clean_rows(part: list[Placed], problems: dict[str, list[Place]], counts: Counter) -> list[Placed]:
    """The rows with what is left of their thinking; `problems` gets the places of those of which too little is left,
    `counts` what was done. A row's `instruction` is what its writer was told beside the question."""
    kept = []
    for place, row in part:
        think, kinds = leave_out(row["question"], row["think"], row["answer"], row.get("instruction", ""))
        counts.update(kinds, rows=1, changed=think != row["think"], before=len(row["think"]), after=len(think))
        if len(think) < KEPT * len(row["think"]):
            problems.setdefault(TOO_LITTLE, []).append(place)
        else:
            kept.append((place, row | {"think": think}))
    return kept


def describe(counts: Counter) -> str:
    """What clean_rows did, for people."""
    share = counts["after"] / counts["before"] if counts["before"] else 1
    text = f"{counts['changed']}/{counts['rows']} 行的思考改过，保留 {share:.1%} 的字"
    kinds = [f"{name} {counts[kind]} 处" for kind, name in KINDS.items() if counts[kind]]
    return f"{text}；去掉的：{'，'.join(kinds)}" if kinds else text
