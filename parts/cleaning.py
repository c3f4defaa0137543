"""A thinking without the traces of its making, sentence by sentence: what can be said without them is kept, what cannot
goes, and what rested on it. Knows how clauses hang together; the words are those of traces.py and rewrites.py."""

import re
from bisect import bisect_left
from collections import Counter

from parts import traces
from parts.rewrites import BY, GIVEN, RULES, SAYS, VERDICT
from parts.rows import Place, Placed

KEPT = 0.6  # share of a thinking's characters below which its row is not worth training on
# A line number, "1. ", ends no sentence; ". " and ", " of English do what 。 and ， do.
SENTENCE = re.compile(
    r"(?:“[^”]{0,120}”|（[^）]{0,160}）|(?!(?<!\d)[.!?]\s)[^。！？；])*(?:[。！？；]+[”’）]*|[.!?]\s+|$)"
)
CLAUSE = re.compile(r"(?:“[^”]{0,120}”|（[^）]{0,160}）|(?!, )[^，：])*(?:[，：]|, |$)")
LEAD = re.compile(
    r"^(?:另外|此外|不过|但是?|然后|接下来|最后|最终|同时|总之|总的来说|总结(?:一下|下来|起来|来说|的话)?|首先|其次|比如|例如|所以|因此|而且|并且|"
    r"还有|还要注意|需要注意|综合来看|因为|虽然|现在|记得|嗯|可能|当然)?[，：]?$"
)
DANGLING = re.compile(
    r"^(?:但是?(?!需要确认)|不过|所以|因此|因为|同时|而且|并且|然后|接着|也(?!许)|然而|而(?!是)|这样的话|这样|，)+(?=.{4})"
)
AFTER_GAP = re.compile(
    r"^(?!所以答案|因此答案)(?:这点|因此|所以|比如|例如|但是?|不过|而且|并且|同时|也就是说|也就是|这样的话)，?(?=.{4})"
)
CITES = re.compile(
    rf"^(?:但是?|不过|而|只是)?{BY}?[^，]{{0,8}}{GIVEN}(?:部分|内容)?[，：]?$"
)  # and says nothing itself
# Of the sentence after one that was mended: two parts of the question, which that one has to name; and what the asker,
# who did not say it, is wrong about.
BOTH, MISREAD = re.compile("这两个(?=方面|部分)"), re.compile("，(?:可能)?用户(?:可能)?有误[解会](?=[，。！？；])")
NAMED = re.compile("^.*?一个?是([^，；。]{2,20})[，；](?:另一个?|二)是([^，；。]{2,20})(?=。)")
BARE = re.compile(r"^我?(?:需要|应该)?(?:(?:组织|整理出?|展开)回答|回答可以稍微(?:涉及|提及|深入))[。！？；]?$")
CITED = re.compile(r"^(?:已经|已|没有?|可能没|可能已|里面没|其中没)")
GOES_ON = re.compile(  # what is said of an answer, after the clause that names it
    r"^(?:比如|例如|还有|以及|包括|甚至|进而|可能因为|没有?(?:讲|说|提|解释|用|区分|太)|只是没|再(?:说|讲)|(?:其实)?就是|它(?:说|提|还)"
    r"|(?:但|而|要)?(?:用自己的话|避免直接|不[能要](?:照搬|直接)))"
)
YES = re.compile("^(?:是的|对)，$")  # to what was said of an answer
BARE_BY = re.compile(r"^(?:但是?|不过)?(?:根据|按照|基于|对于|关于)[^，]*，$")
POINTING = re.compile(
    r"^(?:因此，?|所以)?(?:这也?(?:说明|意味着|可能意味着|与|符合|表明|是|些都?)|这可能意味着|是的，)"
)


def clean(question: str, think: str, answer: str, instruction: str = "") -> tuple[str, Counter]:
    """(the thinking without traces, how many of each kind of parts/traces.py there were). Without any it comes back as
    it was, character for character; cleaned again it does not change."""
    told = (question, answer, instruction, traces.was_shown(think, question, instruction))
    found = traces.find(think, *told)
    done = Counter(trace.kind for trace in found)
    for _ in range(10):  # once or twice: what is mended may show what stood behind it
        if not found:
            break
        think = mend_all(think, [trace.start for trace in found], told)
        found = traces.find(think, *told)
    return think, done


def clean_rows(part: list[Placed]) -> tuple[list[Placed], str]:
    """(the rows with clean thinking, what was done as text). A row's `instruction` is what its writer was told beside
    the question; rows without thinking stay as they are."""
    cleaned, done, before, after, changed = [], Counter(), 0, 0, 0
    for place, row in part:
        think, found = clean(row["question"], row["think"], row["answer"], row.get("instruction", ""))
        cleaned.append((place, row | {"think": think}))
        done += found
        before, after, changed = before + len(row["think"]), after + len(think), changed + (think != row["think"])
    kinds = "，".join(f"{name} {done[kind]} 处" for kind, name in traces.KINDS.items() if done[kind])
    text = f"{changed}/{len(part)} 行的思考改过，保留 {after / before if before else 1:.1%} 的字"
    return cleaned, text + (f"；去掉的：{kinds}" if kinds else "")


def keep_whole(
    cleaned: list[Placed], before: list[Placed], problems: dict[str, list[Place]] | None = None
) -> list[Placed]:
    """The cleaned rows of which at least KEPT is left of the thinking, and no talk of a given answer; `problems` gets
    the places of the others, which without it stay as they were."""
    kept = []
    for (place, row), (_, old) in zip(cleaned, before):
        left = traces.find(row["think"], row["question"], row["answer"], row.get("instruction", ""))
        problem = "清理后仍提到给定的答案" if any(trace.kind == "answer" for trace in left) else None
        if len(row["think"]) < KEPT * len(old["think"]):
            problem = f"清理后剩下的思考不到 {KEPT:.0%}"
        if problem and problems is not None:
            problems.setdefault(problem, []).append(place)
        else:
            kept.append((place, old if problem else row))
    return kept


def mend_all(think: str, places: list[int], told: tuple[str, str, str, bool]) -> str:
    """The thinking with each sentence mended in which one of these places is; `told`: what traces.find
    takes beside it."""
    kept, at = [], 0
    for paragraph in re.split(r"((?:\r?\n)+)", think):
        if not paragraph.strip("\r\n"):
            at += len(paragraph)
            if kept and kept[-1].strip():
                kept.append(paragraph)
            continue
        sentences, mended, gone = [], False, False  # the sentence before this one was mended; or taken out
        whole = [*filter(None, SENTENCE.findall(paragraph)), ""]
        for sentence, following in zip(whole, whole[1:]):
            at += len(sentence)
            found = bisect_left(places, at - len(sentence)) < bisect_left(places, at)
            if found:
                text = mend(NAMED.sub(r"\1和\2都要说明", sentence) if BOTH.search(following) else sentence, told)
            else:
                text = MISREAD.sub("", sentence) if mended else sentence
            if gone and not found:
                rests = POINTING.match(text) and len(text) < 30
                text = "" if rests else AFTER_GAP.sub("", BOTH.sub("各个", text))
            mended, gone = found or not text, not text
            sentences.append(text)
        kept.append("".join(sentences))
    while kept and not kept[-1].strip():
        kept.pop()
    return "".join(kept)


def mend(sentence: str, told: tuple[str, str, str, bool]) -> str:
    """The sentence without its traces, or "" when nothing is left that says something."""

    def find(text: str) -> list:
        return traces.find(text, *told)

    kinds = {trace.kind for trace in find(sentence)}
    if "covert" in kinds:
        sentence = re.sub("，说明(?:他|用户|其|患者)[^，。！？；]*", "", say_plainly(sentence, told))
    for kind, pattern, replacement in RULES:
        if kind in kinds:
            sentence = pattern.sub(replacement, sentence)
    kept: list[str] = []
    rest = min((trace.start for trace in find(sentence) if trace.kind in ("doctor", "two")), default=len(sentence))
    rests, cut, cites = False, False, False  # on what went; the clause before went; and did no more than cite
    for clause in filter(None, CLAUSE.findall(sentence)):
        rest -= len(clause)
        found = find(clause)
        if rest < 0:  # a doctor, or two questions: what follows rests on it, until another thing is spoken of
            rests, rest = True, len(sentence)
        elif rests and any(trace.kind == "answer" for trace in found):
            rests = False
        if rests:
            cut = True
            continue
        if cites:
            clause = re.sub(rf"^(?:里面|其中|它|这里|上面){SAYS}", "可以提到", clause)
        falls = cut and (
            VERDICT.match(clause) and len(clause) < 24 or GOES_ON.match(clause) or cites and CITED.match(clause)
        )
        if found or falls:
            cut, cites = True, bool(found and CITES.match(clause))
            while kept and YES.match(kept[-1]):
                kept.pop()
            continue
        if cut:
            alone = all(LEAD.match(text) for text in kept)
            clause = (DANGLING if alone else re.compile(r"^(?:所以|因此|因为)，?")).sub("", clause)
        kept.append(clause)
        cut = cites = False
    if cut:
        while kept and (LEAD.match(kept[-1]) or BARE_BY.match(kept[-1])):
            kept.pop()
    text = "".join(kept)
    if all(LEAD.match(clause.rstrip("。！？；")) for clause in kept) and not text.endswith("："):
        return ""
    if BARE.match(text) or len(re.sub(r"\W", "", text)) < (2 if text.endswith("：") else 5):
        return ""
    if re.search(r"[。！？；][”’）]*$", sentence) and not re.search(r"[。！？；][”’）]*$", text):
        asks = re.search("是否|吗|呢|吧|什么|哪|如何|怎", text)
        end = re.search(r"([。！？；])[”’）]*$", sentence)[1]
        text = re.sub(r"[，：]$", "", text) + ("。" if end == "？" and not asks else end)
    return text


def say_plainly(sentence: str, told: tuple[str, str, str, bool]) -> str:
    """用户提到X, where the asker did not, becomes X or 关于X."""

    def plain(match: re.Match) -> str:
        said = match[1]
        if not traces.is_covert(match, *told[:3]):
            return match[0]
        if re.match("[“「]?要?(?:详细)?(?:说明|解释|讨论|描述|分析|阐述|列举|比较|简述|概述)", said):
            return ("" if said.startswith("要") else "需要") + said.strip("“”「」")
        if said.startswith("的是"):
            return said[1:]
        follows = sentence[match.end() : match.end() + 1]
        alone = follows == "，" and "的" not in match[0][: match.start(1) - match.start()][-1:]
        noun = re.search(r"^“[^”]*”$|的(?:作用|数据|机制|情况|问题|特点|关系|影响|例子|方法|概念)$", said)
        rests = re.match("，(?:所以|因此)", sentence[match.end() :]) and len(said) < 14 and not noun
        starts = not match.start() or sentence[match.start() - 1] in "，："
        return ("关于" if alone and noun else "需要考虑" if rests and starts else "") + said

    return traces.MENTIONED.sub(plain, sentence)
