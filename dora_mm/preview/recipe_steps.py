"""How many steps a folder of images is given, beside those of the recipe that its config starts from."""

RECIPE_IMAGES = (23, 61)  # the numbers of images that the recipes' steps are for
FEWEST_STEPS, MOST_STEPS = 50, 10_000


def steps_for(num_images: int, recipe_steps: int) -> int:
    """The steps in which each image is seen as often as in the recipe, within limits."""
    return min(max(FEWEST_STEPS, _in_proportion(num_images, recipe_steps)), MOST_STEPS)


def remark_on_steps(num_images: int, recipe_steps: int) -> list[str]:
    """A line where there are so many images that each is seen less often than in the recipe."""
    if (proportional := _in_proportion(num_images, recipe_steps)) <= MOST_STEPS:
        return []
    return [
        f"steps     {MOST_STEPS:,}, where {proportional:,} would show each of the {num_images:,} images as often as "
        "in the recipe: a style is learned long before, and train.steps can be raised when the run is resumed"
    ]


def _in_proportion(num_images: int, steps: int) -> int:
    few, many = RECIPE_IMAGES
    return 50 * round(steps * num_images / min(max(num_images, few), many) / 50)
