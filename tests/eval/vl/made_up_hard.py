"""Made-up answers where a reader may differ from an official script, the same on every machine.

White space in odd places, units, separators of thousands, digits of other alphabets, articles, punctuation,
contractions, numbers as words, percent and currency, letters in brackets, LaTeX, nothing at all, very long answers,
negations, lists.
"""

from string import ascii_uppercase, digits, punctuation

from tests.eval.vl.made_up import LETTER_FORMS, NUM, SAID, TEXTS, MadeUp, Source, boxed


def parts(texts: str) -> tuple[str, ...]:
    """The texts between bars."""
    return tuple(texts.split("|"))


# Separators, of which \v to \x1f, \x85, \u2028 and \u3000 are white space to Python; \u200b and \ufeff are not
BLANKS = parts(
    " |  |\n|\r\n|\t|\x0b|\x0c|\x1c|\x1f|\x85|\xa0|\u1680|\u2009|\u2028|\u202f|\u3000|\u200b|\ufeff|\n\n|\\n|"
)
NUMBERS = parts(
    "1,200|1.200|1 200|1'200|1\u202f200|12,00,000|1,2,3|1,200,000.5|0,5|1200|1200.0|1.2e3|1E3|1e400|-1e-400|-0|+0|"
    "00|007|--7|- 7|\u22127|\u20137|.5|5.|.|..|1.2.3|12%|12 %|12%%|%12|%|-5%|12\u2030|12\uff05|0.5%|100 percent|"
    "$1,200|$1200.00|1,200 USD|\u20ac 1.200,50|\xa35|5\xa2|US$ 3|1/2|\xbd|3:45|2019-05-04|'90s|1990s|1_000|1__0|"
    "0x10|1e|e5|nan|NaN%|-nan|inf|-inf%|Infinity|1j|\u0661\u0662|\uff11\uff12\uff05|\u0967\u0968.\u096b|\xb2|x\xb2|"
    "\u2166|\u2460|10 \u2460|12kg|12 kg|12 kg.|5 km/h|30\xb0C|3.0 x 10^5|3\xd7 10|~12|\u2248 12|<5|> 5|(12)|[12]|"
    "12!|0.475|0.525|10.005|2.675|95|105|104.99|105.01|94.99|0.0049|0.005|1,23|12,345 and 6,789|-12,345.67"
)
WORDS = parts(
    "a|A|an|The|the the|the a dog|a dog|an the|dogs|two|Two|none|None|zero|ten|eleven|twenty-one|one hundred|"
    "twenty two|one, two|yes, no|Yes/No|yes or no|not yes|no not|n't|isnt|isn't|isn\u2019t|ISN'T|couldn'tve|"
    "couldnt've|dont|don't|Im|I'm|ill|i'll|its|it's|It's|'s|let's|lets|that's|Thats|o'clock|oclock|'twas|twas|"
    "y'allll|yall'd've|shes|she's|somebody'd|somebodyd|ma'am|maam|weve|id|wed|hows|ow's'at|'ow'sat|the dog's|dogs'|"
    "rock'n'roll|U.S.A.|u.s.a|e.g.|i.e|Mr. X|St. John's|3.|a.b|a . b|.a|a.|a..b|a.1|1.a|red; blue|red , blue|"
    "red,blue|red, blue, and green|red & blue|[red, blue]|['red', 'blue']|{red}|<red>|red/blue|red-blue|red_blue|"
    "red - blue|red @home|#1|*red*|**red**|`red`|\u201cred\u201d|'red'|\"red\"|red?|red!|red?!|?|!|,|;|:|-|_|\\|/|"
    "()|( )|\u3002|\u4e1c\u4eac\u3002|\u3001|\uff0c|\uff1f"
)
OTHERS = parts(
    "|\x00|\x00a|\ud800|e\u0301|\xe9|\u0130|\u0131|I|i|\u212a|\xdf|SS|\u1e9e|\ufb01|\ufb01ne|\u03a3|\u03a3\u03a3|"
    "\u03c2|\u01c5|\uff21|\uff21\uff22|\u3000\uff41|\U0001f44d\U0001f3fd|\u200d|\u0e01\u0e33|\uac00|\u1100\u1161|"
    "\u0627\u0644|\u202eabc|\\boxed{5}|\\boxed{\\boxed{5}}|\\boxed{\\frac{1}{2}}|$\\boxed{A}$|\\boxed{A}\\boxed{B}|"
    "\\boxed{}|\\boxed{5|\\boxed 5|\\text{B}|\\mathbf{red}|x ^ { 2 }|x^{2}|x^2|\\frac{1}{2}|\\frac 1 2|"
    "\\left( x \\right)|\\[ 5 \\]|\\( 5 \\)|$$5$$|$5$|\\sqrt { 3 }|\\%|\\$5|5\\%|<think>no</think>yes|"
    "<answer>5</answer>|</s>|<unk>|<box>|&amp;|&nbsp;|%20|{'a': 1}|null|true"
)
HARD_TEXTS = (*TEXTS, *NUMBERS, *NUMBERS, *WORDS, *OTHERS)
HARD_AROUND = parts(
    "{}|{}|{}|{}.|{}..|. {} .|the {}|The answer is: {}|the answer is={}|Answer:\n{}|Answer:{}|"
    "answer is {}. So it is {}.|so {}|it is  {}|It is {}.\nThus 7|x={}|x = {} = {}|result {} = 3\nfinal {}|"
    "The final answer is {}. I hope it is right.|could be could be {}|thus\n{}|therefore, {}|{} is it|This is = |"
    "so |is \n{}|not {}|no {}|{}, not that|{}{}|{} {}|{}, {}|{} or {}|{} and {}|({})|[{}]|['{}']|\"{}\"|'{}'|"
    "**{}**|$\\boxed{{}}$|\\text{{}}|<answer>{}</answer>|{} kg|${}|{}%|{} %|about {}|~{}|-{}|+{}|{}0|0{}|{}.0|1,{}|"
    "{},000|{}'s|a {}|{}?|?{}|{};{}|{} . {}|# {}|> {}|- {}\n- {}|1. {}\n2. {}|{}..................................|"
    ". . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . {}.|,,,,,,{}|"
    "{}4|{}.004|{}004|{}.006|is {}1|{}%%|it's {}|the {}'s"
)
HARD_LETTERS = parts(
    "{}|{}.|{})|({})|({}).|[{}]|<{}>|{{}}|$\\boxed{{}}$|\\boxed{\\text{({})}}|**{}**|*{}.*|__{}__|`{}`|\"{}\"|'{}'|"
    "''{}''|{}:|{}. |{}.{text}|{}: {text}|{}) {text}|{} - {text}|{}\\n{text}|{}\n\n{text}|{}.\n{text}|({}){text}|"
    "\n{}\n|\t{}|\xa0{}\xa0|\uff08{}\uff09|\u200b{}|{}\u3002|{}\uff0e|option {}|Option {}:|option ({})|{}!|{}?|?{}|"
    ".{}.|,{},|;{};|:{}:|.,{},.|{lower}|({lower})|{lower}.|The answer is {}|The answer is {}.|"
    "The answer is {}. {text}|The answer is {}\n|The answer is \n{}|the answer is ({}).|"
    "The answer is {}. The answer is {other}.|The answer is {}, The answer is {}.|The answer is: {}.|"
    "The answer is  {}.|The answer is {}{other}.|THE ANSWER IS {}|"
    "The correct answer is **{}**. Here is why: {other} is not in it at all, no|"
    "The correct\nanswer is\t**{lower}** and none of the others, as is plain to all of us|answer is *{}|"
    "Answer is {}) as we see it now|Answer: {}|Answer:{}|Answer: ({})|Answer: {}, not {other}|"
    "Answer: {}Answer: {other}|Answer: \n{}|Answer:|answer: {}|Answer: {text}|Final Answer: {}.|Answer: Apple|"
    "Answer: [{}] {other}|{}, {other}|{} and {other}|{}/{other}|{}{other}|({})({other})|({}) or ({other})|"
    "[{}, {other}]|not {other}|not {}|It is not ({other}), it is ({})|{other} is wrong. {} is right. |Neither|none|"
    "None of the above|All of the above|A|I|A {}|A dog is in it|An A|a|Z|Z.|Z {}|(Z) {}|z|"
    "Cannot determine the answer|Cannot determine the answer: {}|I can't process this file. {}|"
    "I'm sorry, but without the image provided {}|Failed to obtain answer via API {}|{text}|{text}|{text}|{text}|"
    "{text}|{text} |{text}.|The {text}|{text} {text}|not {text}|this might be {text}|"
    "this might well be {text}|it might well just be {text}|"
    "{text} or {othertext}|"
    "I can see that this is {othertext}, but then {text}|we think that it should be {text} there|"
    "we think that it should be {text} there, {text}, or {othertext}|"
    "Because x = 5, y = 3. So {} it is, as I said before|{} is one of those that I would take here today|"
    "As I said: {} one two three|As I said: {} one two three four|<think>{other}</think>{}|"
    "<think>The answer is {other}.</think>\nThe answer is {}.||\n| |.|()|( {} )|{ {} }|- {}|1. {}|#{}#|{}\x1c|"
    "\x85{}\x85|{}\u2028{text}"
)
STATED = [form for form in HARD_LETTERS if "The answer is" in form]
HARD_SAID = parts(
    'Yes|yes|YES|No|no|NO|nO|not|Not|NOT|No.|no.|No!|No,|,No|No;|No:|"No"|(No)|*No*|**No**|No\n|\nNo|No\r|No\t|'
    "\tNo|No\xa0| No|  no |No no|no,no|no, no|n,o|No,t|Yes, no|yes, no|no, yes|Yes/No|yes or no|Yes and no|"
    "Yes. No.|No. Yes.|.No|. No|..no|Yes.no|a.b no|U.S. no|3.5 no|No\u3002|\uff2e\uff4f|No\uff0c|nope|Nope, no|"
    "none|None|nothing|there is not|There is not, I think.|There isn't|cannot|can not|knot|know|notice|it's not|"
    "not\na {}|a {} not|not,|not;|n't|there are no {}|There are no, {}|without {}|never|neither|I do not see a {}|"
    "Yes, there is not only a {}|Yes it is no {}|{}|{}, no|no {}|no{}|{}no|Yes, a {}|||.|,|\n| |no\x1cyes|"
    "yes\x1cno|no\u200b|\u200bno|\ufeffNo|<think>no</think>yes|The answer is no|The answer is: no.|Answer:no|"
    "answer: No|false|true|0|1"
)


def hard_text(draw: Source) -> str:
    """A text of the pools, sometimes with other white space, or far longer."""
    text = draw.pick(HARD_TEXTS)
    return (text + draw.pick(BLANKS)) * (50 + draw.number(200)) if draw.random() < 0.004 else text


def changed(draw: Source, text: str) -> str:
    """A text after one change that a rule may undo."""
    if (how := draw.number(9)) < 3:
        at = draw.pick((0, len(text), draw.number(len(text) + 1)))
        return text[:at] + draw.pick(BLANKS if how < 2 else ",.'?!-;:()%$") + text[at:]
    if how == 3:
        return draw.pick((str.upper, str.lower, str.title, str.swapcase))(text)
    if how == 4:
        return text.replace(" ", draw.pick(BLANKS))
    if how == 5:
        return text.translate({ord(digit): chr(0xFEE0 + ord(digit)) for digit in digits})
    if how == 6:
        return draw.pick(
            (text.removeprefix("the "), text.replace("'", ""), text.replace(",", ""), text.replace(".", ""))
        )
    if how == 7:
        return draw.pick(HARD_AROUND).replace("{}", text)
    at = draw.number(len(text) + 1)
    return text[:at] + text[at + 1 + draw.number(2) :]


def several_changes(draw: Source, text: str) -> str:
    for _ in range(draw.number(4)):
        text = changed(draw, text)
    return text


def hard_answers(seed: int, references: int | None = None) -> list[MadeUp]:
    """Answers in words and numbers, changed up to three times from one of their references, or not."""
    draw = Source(seed)
    rows = []
    for _ in range(NUM):
        few = [hard_text(draw) for _ in range(1 + draw.number(3))]
        known = [draw.pick(few) for _ in range(references or 1 + draw.number(4))]
        known = tuple(changed(draw, text) if draw.random() < 0.3 else text for text in known)
        said = several_changes(draw, draw.pick(known) if draw.random() < 0.9 else hard_text(draw))
        rows.append(MadeUp(said, known, kind=draw.pick(("HME100k", "IIIT5K", "ct80", "FUNSD"))))
    return rows


def hard_choices(seed: int, most: int) -> list[MadeUp]:
    """Answers to questions whose options may be alike, a letter, in one another or empty."""
    draw = Source(seed)
    rows = []
    for _ in range(NUM):
        options = tuple(several_changes(draw, draw.pick(HARD_TEXTS)) for _ in range(2 + draw.number(most - 1)))
        options = (*options[1:], draw.pick((options[0], options[0], options[1], options[1] + " x", "A", "(B)", "")))
        letters = ascii_uppercase[: len(options)]
        letter, named, other = (draw.pick(letters) for _ in range(3))
        named = letter if draw.random() < 0.6 else named
        text, other_text = options[letters.index(named)], options[letters.index(other)]
        said = draw.pick(draw.pick((HARD_LETTERS, HARD_LETTERS, STATED, LETTER_FORMS, ("{text}",))))
        said = said.replace("{}", named).replace("{lower}", named.lower()).replace("{other}", other)
        said = said.replace("{text}", text).replace("{othertext}", other_text)
        said = changed(draw, said) if draw.random() < 0.2 else said
        said = f"{said} {'Hence, I think so. ' * 300}" if draw.random() < 0.005 else said
        rows.append(MadeUp(said, options=options, letter=letter))
    return rows


def hard_yes_or_no(seed: int) -> list[MadeUp]:
    """Answers to questions of yes or no, with both words, neither, or one in another word."""
    draw = Source(seed)
    rows = []
    for _ in range(NUM):
        said = draw.pick(HARD_SAID if draw.random() < 0.9 else SAID).replace("{}", hard_text(draw))
        said = changed(draw, said) if draw.random() < 0.3 else said
        rows.append(MadeUp(said, (draw.pick(("yes", "no")),)))
    return rows


def hard_statements(seed: int) -> list[tuple[str, MadeUp]]:
    """Answers about pairs of images with their ids, as a line of a CSV file can hold them: without line breaks."""
    draw = Source(seed)
    said = parts(
        "True|TRUE|true|tRUE|True\xa0|true\t|true.|True!|(True)|Truee|Tru|\uff34rue|yes|1|no|0|False|FALSE|false|fAlSE|"
        "false.|not true|not False|true false|True/False|\u0455|falsch|False\u3000|None||t|f|\u017frue|Fal\u017fe|"
        "FAL\u1e9eE| true|\tTrue|  False|True,|true, it is|False,true|true ,|false ,x|,True|True\x1c|\u200bTrue"
    )
    rows = []
    for number in range(NUM):
        name, right = f"test1-{number // 8 * 7}-{number % 4}-{number // 4 % 2}", draw.pick(("True", "False"))
        rows.append((name, MadeUp(right.swapcase() if draw.random() < 0.7 else draw.pick(said), (right,))))
    return rows


def hard_sentences(seed: int) -> list[MadeUp]:
    """Sentences of ASCII, with all its punctuation and white space between and in words."""
    draw = Source(seed)
    texts = [text for text in HARD_TEXTS if text.isascii()]
    gaps = [*(gap for gap in BLANKS if gap.isascii()), *punctuation, "...", " - ", "--", "\x00", "\x7f"]

    def sentence(most: int) -> str:
        return "".join(draw.pick(texts) + draw.pick(gaps) for _ in range(draw.number(most)))

    rows = []
    for _ in range(NUM):
        known = tuple(sentence(20) for _ in range(1 + draw.number(4)))
        near = draw.pick(known)
        start = draw.number(len(near) + 1)
        said = draw.pick((near[start:] + near[:start], near[start:] + sentence(10), near.upper(), near, sentence(20)))
        said = sentence(500) + said if draw.random() < 0.01 else said
        rows.append(MadeUp(draw.pick((str.lower, str.title, str))(said), known))
    return rows


def hard_points(seed: int) -> list[MadeUp]:
    """Boxes near to the right one as two points of 999 steps, in the forms of Qwen-VL and such as only look like it."""
    draw = Source(seed)
    shapes = parts("{:.0f}|{:.0f}|{:.1f}|{:.3e}| {:.0f}|{:.0f} |+{:.0f}|-{:.0f}|{:.0f}.|0{:.0f}|{:.0f}_0")
    odd = ("nan", "inf", "-inf", "1e400", "", "x", "\u0661\u0662", "\uff15", "\u00b2", "1,2", "(", "1_0", "0x1")
    forms = parts(
        "({a},{b}),({c},{d})|<box>({a},{b}),({c},{d})</box>|<ref>it</ref><box>({a},{b}),({c},{d})</box>|"
        "({a}, {b}),({c}, {d})|({a},{b}), ({c},{d})|({a},{b})({c},{d})|(({a},{b}),({c},{d}))|({a},{b}),\n({c},{d})|"
        "({a},{b},{c}),({c},{d})|({a}),({c},{d})|(x),({a},{b}),({c},{d})|it (1) is ({a},{b}),({c},{d})|"
        "({c},{d}),({a},{b})|({a},{d}),({c},{b})|[{a},{b},{c},{d}]|({a},{b}),({c},{d}|"
        "({a},{b}),({c},{d}),({a},{b}),({c},{d})|(1,1),(2,2) or ({a},{b}),({c},{d})|({a},\n{b}),({c},{d})|"
        "({a},{b}),({c},{d},)|(),()|\uff08{a},{b}\uff09,\uff08{c},{d}\uff09|({a}\u3001{b}),({c}\u3001{d})|"
        "({a}\xa0,{b}),({c},\u2009{d})|({a},{b}),({a},{b})"
    )
    rows = []
    for row in boxed(seed):
        moved = [value + (draw.number(31) - 15 if draw.random() < 0.6 else 0) for value in row.box]
        steps = [999 * value / row.size[place % 2] for place, value in enumerate(moved)]
        usual = draw.random() < 0.5
        said = [("{:.0f}" if usual else draw.pick(shapes)).format(step) for step in steps]
        said = [draw.pick(odd) if draw.random() < 0.03 else text for text in said]
        form = forms[0] if draw.random() < 0.3 else draw.pick(forms)
        rows.append(MadeUp(form.format(**dict(zip("abcd", said, strict=True))), box=row.box, size=row.size))
    return rows


def hard_boxes(seed: int) -> list[MadeUp]:
    """Boxes near to the right one as shares, with white space, signs, digits and brackets where a reader may differ."""
    draw = Source(seed)
    blanks = ("", "", "", " ", "  ", "\n", "\t", "\u00a0")
    around = ("{}", "{}", "It is {}.", "[1, 2] {}", "{} or [0, 0, 1, 1]", "[0.1, 0.2, {}", "[{}]", "```json\n{}\n```")
    rows = []
    for row in boxed(seed):
        width, height = row.size
        shares = [value / (width, height)[place % 2] for place, value in enumerate(row.box)]
        shapes = ("{:.3f}", "{:.2f}", "{:.3f}", "{:.1f}", "+{:.3f}", "{:.0f}.", "{:.2e}", "-{:.3f}", "{:.3f}%")
        usual = draw.random() < 0.7
        numbers = [(shapes[0] if usual else draw.pick(shapes)).format(share) for share in shares]
        numbers = [text.removeprefix("0") for text in numbers] if draw.random() < 0.1 else numbers
        before, behind, first, last = (draw.pick(blanks) if draw.random() < 0.3 else "" for _ in range(4))
        text = f"{before},{behind}".join(numbers)
        brackets = draw.pick(("[{}]", "[{}]", "[{}]", "({})", "[{},]", "[{}, 0.5]", "\uff3b{}\uff3d"))
        rows.append(
            MadeUp(draw.pick(around).replace("{}", brackets.format(first + text + last)), box=row.box, size=row.size)
        )
    return rows
