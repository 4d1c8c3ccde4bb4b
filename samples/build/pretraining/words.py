"""The first step of the embedded vision-language model: visual tokens that resemble the words for what they show.

No language model computes here, only its table of embeddings, so a step costs a fifth of one through it. The token of
the cell with an object's centre should resemble the words for its name, colour, size and place; the other cells of an
object the word "part"; and all others those for the background.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from samples.build.pretraining.vision_end import GRID
from samples.build.scenes.colors import PAINTS, PALE
from samples.build.scenes.scenes import PHOTOS, SIZE, Scene
from samples.build.scenes.things import Thing

CELL = SIZE // GRID  # pixels
UNKNOWN = -100  # the label of a cell for which a kind of word does not apply
ACROSS, DOWN = ("left", "middle", "right"), ("top", "middle", "bottom")
THIRD = (0, 0, 1, 1, 1, 2, 2)  # of the image that a row or column of cells is in, as an index of ACROSS and DOWN
BACKGROUND_WEIGHT = 0.15  # of a cell without an object's centre, beside 1: there are some 15 for one with
SHARPNESS = 16.0  # logit of a token that is exactly a word's deviation from the mean embedding, and as long
LENGTH_WEIGHT = 0.05  # of the tokens' squared relative deviation from the embeddings' mean length


class Words:
    """The words for cells of scenes, as vectors of a language model.

    Args:
        embeddings: The table of embeddings of the language model (V, D).
        tokenize: Text -> token ids.
        things: All objects.
    """

    def __init__(self, embeddings: Tensor, tokenize: Callable[[str], list[int]], things: Sequence[Thing]):
        self.names = (*(thing.name for thing in things), "background", *PHOTOS, "part")
        self.colors = tuple(dict.fromkeys((*PAINTS, *PALE)))
        self.mean = embeddings.mean(0)
        self.length = (embeddings - self.mean).norm(dim=1).mean()
        self.vectors = []
        for words in (self.names, self.colors, ("large", "small"), ACROSS, DOWN):
            found = torch.stack([embeddings[tokenize(f" {word}")].mean(0) for word in words])
            self.vectors.append(F.normalize(found - self.mean, dim=1))
        self.weights = torch.tensor([1.0] * len(things) + [BACKGROUND_WEIGHT] * (len(self.names) - len(things)))

    def labels(self, scene: Scene) -> Tensor:
        """The words for each cell: indices (5, 49) of names, colours, sizes, places across and down, or UNKNOWN."""
        ground = scene.background
        found = torch.full((5, GRID, GRID), UNKNOWN)
        found[0] = self.names.index("background" if ground.color else ground.name)
        found[1] = self._color(ground.color)
        middles = torch.arange(GRID) * CELL + CELL // 2
        for placed in scene.objects:
            inside = ((middles - placed.y).abs() < placed.size / 2)[:, None] & (
                (middles - placed.x).abs() < placed.size / 2
            )
            found[0, inside] = self.names.index("part")
            found[1, inside] = self._color(placed.color)
        for placed in scene.objects:
            row, column = placed.y // CELL, placed.x // CELL
            words = (self.names.index(placed.name), self._color(placed.color), int(not placed.large))
            found[:, row, column] = torch.tensor([*words, THIRD[column], THIRD[row]])
        return found.flatten(1)

    def _color(self, name: str | None) -> int:
        return UNKNOWN if name is None else self.colors.index(name)

    def loss(self, tokens_BND: Tensor, labels_B5N: Tensor) -> Tensor:
        """The sum over the kinds of words of the cross-entropy, each word's logit being the token's part along it."""
        tokens = (tokens_BND.float() - self.mean) / self.length
        total = LENGTH_WEIGHT * (tokens.norm(dim=-1) - 1).square().mean()
        for kind, vectors in enumerate(self.vectors):
            logits, labels = SHARPNESS * tokens @ vectors.T, labels_B5N[:, kind]
            if (labels != UNKNOWN).any():
                weights = self.weights if kind == 0 else None
                total = total + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weights)
        return total

    @torch.no_grad()
    def accuracy(self, tokens_BND: Tensor, labels_B5N: Tensor) -> tuple[float, ...]:
        """The share of right words at the centres of objects, for each kind of words."""
        tokens, centers = tokens_BND.float() - self.mean, labels_B5N[:, 2] != UNKNOWN
        found = []
        for kind, vectors in enumerate(self.vectors):
            known = centers & (labels_B5N[:, kind] != UNKNOWN)
            right = (tokens @ vectors.T).argmax(-1) == labels_B5N[:, kind]
            found.append(float(right[known].float().mean()))
        return tuple(found)
