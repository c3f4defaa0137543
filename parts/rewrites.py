"""What a sentence says once the traces of its making are out of it: the patterns, in the order in which they are tried.
Knows words; which sentences are mended, and what goes when no pattern fits, is cleaning.py's."""

import re

from parts import traces

GIVEN, WRITTEN = f"(?:{traces.ANSWER.pattern})", f"(?:{traces.PROCESS.pattern})"
SAID = r"[^，。！？；：\n]"  # a character of what is said, to the end of the clause
SAYS = (  # what a given answer does, without what it says
    r"(?:里|中|内容|部分|里面|最后部分|的最后部分|中的最后部分)?(?:还|也|就|已经|已|主要|只|特别|最后|似乎|可能|确实|都|有)*"
    r"(?:提到|提及|提出|指出|说明|说|写|列出|列举|列|给出|给|讲|点出|概括|强调|描述|采用|用|建议|认为|介绍|涉及|包含|包括|涵盖)(?:到|了|过|着)*"
)
BY = r"(?:根据|按照|依据|基于|参考|参照|结合|依照|照着|按(?!照)|从|(?<![按依对参])照|对照)"
ADVISES = r"(?:首推|推荐|建议|提醒|采用|选择|要求|主张)"
ORDER = r"(?:例子|步骤|要点|顺序|结构|内容|逻辑|思路)"
NAMES = r"(?:提到|提及|指出|强调)"
VERDICT = re.compile(  # of a given answer; falls with the clause that speaks of it
    r"^(?:但|不过)?(?:所以|因此|这点?|也|就|都|应该|可能|已经|这些?|那么|应|属于健康建议)*"
    r"(?:没问题|没有问题|足够|够了|可以接受|是?合适|不需要|无需|不必|不用|可以不|可以保持|可以稍微|带过|很重要"
    r"|是?正确|是?合理|是?对的|即可|涵盖|覆盖|包括在内|部分说明|不准确|遗漏|思考过程)"
)
ENOUGH = r"没问题|(?:可能|应该|已经?|就|这)足够|足?够了|不需要|无需|不必|不用|可以保持|可以接受|带过|合适的"
# Rules for one sentence, in this order: the kind of trace, a pattern, what stands there afterwards. X is what is said.
RULES = [
    # X（答案提到的） -> X; X，根据答案是Y -> X，是Y; X在答案里属于Y -> X属于Y; X在答案里没有提到，但Y -> XY
    ("answer", rf"（[^（）]{{0,6}}{GIVEN}[^（）]{{0,6}}）", ""),
    ("answer", rf"{BY}{GIVEN}(?=是{SAID}{{2}})", ""),
    ("answer", rf"在{GIVEN}(?:里|中)(?:也|还)?(?=属于|是|被|算)", ""),
    (
        "answer",
        rf"(?<=[^，。]{{2}})在{GIVEN}(?:里|中)(?:并|也)?(?:没有?|未)(?:提到|提及|出现|涉及)到?，(?:但|不过)?",
        "",
    ),
    # 按照答案的步骤来组织 -> 组织
    (
        "answer",
        rf"(?:严格)?{BY}(?:{GIVEN}|给出|列出|提供|给定)(?:中的|里的|的)?{ORDER}?来(?=组织|安排|说明|展开|写|讲)",
        "",
    ),
    # 应该按照答案的结构，但更详细地解释X -> 应该更详细地解释X
    ("answer", rf"(?<=应该|需要){BY}{GIVEN}的?{ORDER}，但?(?=更|先)", ""),
    # 答案中提到“X”，这可能是指Y -> “X”可能是指Y
    ("answer", rf"{GIVEN}(?:里|中)?(?:还|也)?{NAMES}[了的]?(“[^”]+”)，?这?(?=(?:可能|应该)?是?指)", r"\1"),
    # 正如答案所说，X -> X; 除了答案提到的之外，X -> X; 答案之所以X -> 之所以X; 为什么答案里X -> 为什么X
    ("answer", rf"(?:正如|就像|如同|如|像){GIVEN}(?:里|中)?所?(?:说|述|讲|写|示|提到|指出)?(?:的|的那样|那样)?，", ""),
    ("answer", rf"除了?{GIVEN}(?:里|中)?所?(?:提及|提到|说|列|写)的?(?:之外|以外|外)，", ""),
    ("answer", rf"{GIVEN}(?=之所以|为什么)|(?<=为什么){GIVEN}(?:里|中)?", ""),
    # 答案里提到的例子是X，所以用户希望用这些例子 -> 例子可以是X; 答案里提到的是X -> 可以提到X; 答案里用的是X -> 可以用X
    ("answer", rf"，所以(?:可能)?用户(?:可能)?(?:希望|想要?|要求){SAID}{{0,4}}[用按以]这(?:些|几个){SAID}{{0,6}}", ""),
    ("answer", rf"{GIVEN}{SAYS}的(例子|内容|步骤)是(?={SAID}{{2}})(?!合适|正确|合理)", r"\1可以是"),
    ("answer", rf"(?<!如果)(?<!因为){GIVEN}(?:里|中)?采?用的是(?={SAID}{{2}})(?!合适|正确|合理)", "可以用"),
    (
        "answer",
        rf"(?<!如果)(?<!因为){GIVEN}(?!(?:里|中)?已){SAYS}的是(?={SAID}{{2}})(?!合适|正确|合理|{SAID}*，[但而并也]?没有?[提说讲])",
        "可以提到",
    ),
    # 答案中提到的几点包括X -> 要点包括X
    ("answer", rf"{GIVEN}{SAYS}的(?:这?几个?|这些|各)?点(?={SAID}{{2}})", "要点"),
    # 答案中提到的X -> X
    (
        "answer",
        rf"(和|与|跟|同)?{GIVEN}{SAYS}的(?={SAID}{{2}})(?!是|部分|内容|可能|已)",
        lambda match: match[0] if match[1] else "",  # a comparison goes as a whole
    ),
    # 根据答案，里面提到X -> 可以提到X
    ("answer", rf"{BY}{GIVEN}，?(?:里面|其中){SAYS}(?={SAID}{{2}})", "可以提到"),
    # 答案里说X -> X; 答案最后建议X -> 建议X
    (
        "answer",
        rf"(?<!如果)(?<!因为){GIVEN}(?:里|中|最后|也|还)*(?:说|认为|(?={ADVISES}))(?:是|的是)?(?!了|什么|明)(?={SAID}{{3}})",
        "",
    ),
    # 根据答案中的描述，X -> X, where X says something of its own
    (
        "answer",
        rf"(?<!应该)(?<!需要){BY}{GIVEN}(?:部分|的|中的|里的|中|里)*"
        r"(?:描述|内容|结构|建议|要点|步骤|信息|提示|说明|思路|逻辑|框架|例子|数据|解释|顺序)?"
        rf"(?:来看|来说|所述|所说|所示|可知)?，(?={SAID}{{3}})(?!已|没|可能没|可能已|里面|其中|但)",
        "",
    ),
    # 如果答案提到X -> 如果提到X; 答案里提到X是对的 -> X
    ("answer", rf"(如果|虽然|即使|正是|就是){GIVEN}(?:里|中)?(?:还|也)?(?={NAMES}{SAID}{{2}})", r"\1"),
    ("answer", rf"{GIVEN}(?:里|中)?(?:还|也)?{NAMES}了?({SAID}{{4,60}}?)是(?:正确|对)的(?=[，。！？；]|$)", r"\1"),
    # 答案中提到X -> 可以提到X, unless it is said only to say that X is there and nothing is missing
    (
        "answer",
        rf"(?:因为|由于|可能)?{GIVEN}(?:里|中|部分|最后|的?最后部分)?(?:还|也|主要|特别|最后|有|已经|已)?"
        rf"(?:{NAMES}|讲到|写到|写着|显示)了?(?={SAID}{{2}})(?!的|{SAID}{{0,60}}(?:正确|对的|合理|合适|足够|已经|包括了|可能)的?)"
        rf"(?![^。！？]{{0,200}}(?:{ENOUGH}))",
        "可以提到",
    ),
    # ..., and not that it therefore belongs there
    ("answer", rf"(可以提到{SAID}{{2,}})，所以(?:应该|需要|要)?也?(?:包括|包含|加|写)(?:进去|进来|在内)", r"\1"),
    # 答案主要分为X -> 可以分为X; 答案列出了X -> 可以提到X; 答案的逻辑是X -> X
    ("answer", rf"(?<![把将]){GIVEN}(?:里|中)?(?:主要|大致|应)?(?=分[为成][^，]{{2}})", "可以"),
    ("answer", rf"{GIVEN}(?:里|中)?(?:列出|列举|给出)了(?={SAID}{{4}})", "可以提到"),
    ("answer", rf"{GIVEN}的(?:逻辑|结构|顺序|思路|框架)(?:应该|主要)?[是为](?={SAID}{{2}})", ""),
    ("answer", rf"(?<=确保|保证){GIVEN}(?:里|中)的(?={SAID}{{2}})", ""),
    # 答案中的X -> X; a comparison with it goes as a whole, and so does praise of it
    (
        "answer",
        rf"(和|与|跟|同|符合|对应|参考)?{GIVEN}(?:中|里|部分)的(?={SAID}{{2}})"
        rf"(?!部分|最后|点|第|内容|描述|推荐是|建议是|说法|信息|顺序|思路|{SAID}{{0,12}}是(?:合理|正确|合适)的|{SAID}{{0,60}}(?:足够|没问题|已经))",
        lambda match: match[0] if match[1] else "",
    ),
    ("answer", rf"(?<=说明|解释|覆盖){GIVEN}(?:中|里)(?=每|各|所有|这|那|几)", ""),
    ("answer", r"(?<!组织)(?<!考虑)(?<!注意)答案的(?=要点|关键点|重点)", ""),
    # A check of the answer is one of the reply.
    ("answer", r"(?<=检查|确认|确保|核对|判断|保证|考虑)答案(?=是否|覆盖|涵盖|没有|包含|包括)", "回答"),
    ("answer", "标准答案(?!$)", "标准的"),
    # What was to be written down is the reply; that it was to be, is nobody's matter.
    ("process", rf"总结(?:一下|下来|起来)?(?:我的)?{WRITTEN}(?=[：:])", "总结"),
    ("process", rf"作为{WRITTEN}，?(?={SAID}{{3}})", ""),
    ("process", rf"(?:用户|系统|题目|任务)(?:让|要求?|希望)我?(?:看到)?[^，。]{{0,3}}{WRITTEN}，", ""),
    (
        "process",
        r"(?:来|我?需要|所以重点是|重点是|并|，)+(?:解释|倒推|反推|推导|写出|写下|展示|描述|撰写|模拟|还原|生成|说明|输出)(?:一下|出)?"
        rf"(?:我的)?{WRITTEN}",
        "",
    ),
    ("process", rf"(?:所以)?重点是(?:分析)?{WRITTEN}", ""),
    # No reply makes sure of something, its writer does.
    (
        "process",
        rf"(?:我的)?{WRITTEN}(?:中|里)?(?=也?(?:需要|应该|应|要)先?(?:确认|考虑|检查|核对|判断|排除|回忆))",
        "",
    ),
    ("process", rf"(?<![下示释述成原])(?<!以上就是)(?<!写出)(?:我的)?{WRITTEN}(?!结束)", "回答"),
]
RULES = [(kind, re.compile(pattern), after) for kind, pattern, after in RULES]
