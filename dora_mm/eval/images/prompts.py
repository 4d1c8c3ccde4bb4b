"""Prompts about a concept: a template with `{thing}`, and the name with its article."""

from dora_mm.eval.images.concepts import Concept

SINGULAR_IN_S = {"compass", "lens", "canvas"}
UNCOUNTED = {"bread", "corn", "bacon", "popcorn", "sushi", "cheese", "broccoli"}
VOWEL_SOUNDS = ("a", "e", "i", "o", "um", "hour")


def with_article(name: str) -> str:
    """ "a bus", "an hourglass", and no article before plurals ("books") and what is not counted ("bread")."""
    last = name.split(" of ")[0].split()[-1]
    if last in UNCOUNTED or (last.endswith("s") and not last.endswith(("ss", "us")) and last not in SINGULAR_IN_S):
        return name
    return f"{'an' if name.startswith(VOWEL_SOUNDS) else 'a'} {name}"


def fill(template: str, concept: Concept) -> str:
    """ "a flat icon of {thing}" -> "a flat icon of an owl"."""
    return template.replace("{thing}", with_article(concept.name))
