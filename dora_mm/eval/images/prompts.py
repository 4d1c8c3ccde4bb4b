"""Prompts for a concept: a template with `{thing}`, which is replaced by its name with an article."""

from dora_mm.eval.images.concepts import Concept

SINGULAR_IN_S = {"compass", "lens", "canvas"}
UNCOUNTED = {"bread", "corn", "bacon", "popcorn", "sushi", "cheese", "broccoli"}
VOWEL_SOUNDS = ("a", "e", "i", "o", "um", "hour")


def with_article(name: str) -> str:
    """Returns "a bus", "an hourglass"; plurals ("books") and uncountable nouns ("bread") get no article."""
    last = name.split(" of ")[0].split()[-1]
    if last in UNCOUNTED or (last.endswith("s") and not last.endswith(("ss", "us")) and last not in SINGULAR_IN_S):
        return name
    return f"{'an' if name.startswith(VOWEL_SOUNDS) else 'a'} {name}"


def fill(template: str, concept: Concept) -> str:
    """Fills a template: "a flat icon of {thing}" becomes "a flat icon of an owl"."""
    return template.replace("{thing}", with_article(concept.name))
