"""The official VQA v2 evaluation, and the older script that LAVIS copies, transcribed step by step as test references.

Nothing here is shared with dora_mm, and nothing is shortened: as in the scripts, answers are dicts as in the
annotations, the ten accuracies are averaged one by one, and contractions are a list of pairs.
"""

import re

MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
NUMBER_WORDS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = ["a", "an", "the"]
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
COMMA = re.compile(r"(\d)(\,)(\d)")

PAIRS = """
aint ain't, arent aren't, cant can't, couldve could've, couldnt couldn't, couldn'tve couldn't've,
couldnt've couldn't've, didnt didn't, doesnt doesn't, dont don't, hadnt hadn't, hadnt've hadn't've, hadn'tve hadn't've,
hasnt hasn't, havent haven't, hed he'd, hed've he'd've, he'dve he'd've, hes he's, howd how'd, howll how'll, hows how's,
Id've I'd've, I'dve I'd've, Im I'm, Ive I've, isnt isn't, itd it'd, itd've it'd've, it'dve it'd've, itll it'll,
let's let's, maam ma'am, mightnt mightn't, mightnt've mightn't've, mightn'tve mightn't've, mightve might've,
mustnt mustn't, mustve must've, neednt needn't, notve not've, oclock o'clock, oughtnt oughtn't, ow's'at 'ow's'at,
'ows'at 'ow's'at, 'ow'sat 'ow's'at, shant shan't, shed've she'd've, she'dve she'd've, she's she's, shouldve should've,
shouldnt shouldn't, shouldnt've shouldn't've, shouldn'tve shouldn't've, somebody'd somebodyd,
somebodyd've somebody'd've, somebody'dve somebody'd've, somebodyll somebody'll, somebodys somebody's,
someoned someone'd, someoned've someone'd've, someone'dve someone'd've, someonell someone'll, someones someone's,
somethingd something'd, somethingd've something'd've, something'dve something'd've, somethingll something'll,
thats that's, thered there'd, thered've there'd've, there'dve there'd've, therere there're, theres there's,
theyd they'd, theyd've they'd've, they'dve they'd've, theyll they'll, theyre they're, theyve they've, twas 'twas,
wasnt wasn't, wed've we'd've, we'dve we'd've, weve we've, werent weren't, whatll what'll, whatre what're, whats what's,
whatve what've, whens when's, whered where'd, wheres where's, whereve where've, whod who'd, whod've who'd've,
who'dve who'd've, wholl who'll, whos who's, whove who've, whyll why'll, whyre why're, whys why's, wont won't,
wouldve would've, wouldnt wouldn't, wouldnt've wouldn't've, wouldn'tve wouldn't've, yall y'all, yall'll y'all'll,
y'allll y'all'll, yall'd've y'all'd've, y'alld've y'all'd've, y'all'dve y'all'd've, youd you'd, youd've you'd've,
you'dve you'd've, youll you'll, youre you're, youve you've
"""
CONTRACTIONS = dict(pair.split() for pair in PAIRS.replace("\n", " ").split(", "))


def punctuation(text):
    result = text
    for mark in MARKS:
        if (mark + " " in text or " " + mark in text) or re.search(COMMA, text) is not None:
            result = result.replace(mark, "")
        else:
            result = result.replace(mark, " ")
    return PERIOD.sub("", result, count=re.UNICODE)


def digits_and_articles(text):
    words = []
    for word in text.lower().split():
        word = NUMBER_WORDS.get(word, word)
        if word not in ARTICLES:
            words.append(word)
    for index, word in enumerate(words):
        if word in CONTRACTIONS:
            words[index] = CONTRACTIONS[word]
    return " ".join(words)


def without_line_breaks(text):
    text = text.replace("\n", " ")
    text = text.replace("\t", " ")
    return text.strip()


def mean_over_annotators(prediction, annotations):
    accuracies = []
    for own in annotations:
        others = [annotation for annotation in annotations if annotation != own]
        matching = [annotation for annotation in others if annotation["answer"] == prediction]
        accuracies.append(min(1, float(len(matching)) / 3))
    return float(sum(accuracies)) / len(accuracies)


def annotations_of(answers):
    return [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number, answer in enumerate(answers, start=1)
    ]


def official(prediction, annotations):
    """The script that came with VQA v2."""
    annotations = [dict(annotation) for annotation in annotations]
    for annotation in annotations:
        annotation["answer"] = without_line_breaks(annotation["answer"])
    prediction = without_line_breaks(prediction)
    if len({annotation["answer"] for annotation in annotations}) > 1:
        for annotation in annotations:
            annotation["answer"] = punctuation(annotation["answer"])
            annotation["answer"] = digits_and_articles(annotation["answer"])
        prediction = punctuation(prediction)
        prediction = digits_and_articles(prediction)
    return mean_over_annotators(prediction, annotations)


def lavis(prediction, annotations):
    """The older script."""
    annotations = [dict(annotation) for annotation in annotations]
    prediction = without_line_breaks(prediction)
    prediction = punctuation(prediction)
    prediction = digits_and_articles(prediction)
    if len({annotation["answer"] for annotation in annotations}) > 1:
        for annotation in annotations:
            annotation["answer"] = punctuation(annotation["answer"])
    return mean_over_annotators(prediction, annotations)
