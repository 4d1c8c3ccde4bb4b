import errno
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.data.images.buckets import frame
from dora_mm.data.images.latents import LatentCache, Latents, latent_key


def latents(seed, dtype=torch.float32):
    draws = torch.Generator().manual_seed(seed)
    return Latents(*(torch.randn(4, 8, 8, generator=draws).to(dtype) for _ in range(2)))


def forbidden():
    raise AssertionError("the cache has this entry")


def same(one, other):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


@pytest.fixture(params=["folder", "memory"])
def cache(request, tmp_path):
    return LatentCache(tmp_path / "latents" if request.param == "folder" else None)


def test_computed_latents_are_returned_again(cache):
    first = cache.get("aa11", lambda: latents(1, torch.bfloat16))
    assert isinstance(first, Latents)
    assert same(first, cache.get("aa11", forbidden))
    assert same(cache.get("bb22", lambda: latents(2)), latents(2))
    assert same(first, cache.get("aa11", forbidden))


def test_a_family_that_trains_on_the_mode_keeps_no_variance(cache):
    mode = Latents(latents(1).mean, None)
    for compute in (lambda: mode, forbidden):
        found = cache.get("aa11", compute)
        assert torch.equal(found.mean, mode.mean)
        assert found.logvar is None
        assert found.sample(torch.Generator()) is found.mean


def test_a_folder_is_used_by_the_next_run(tmp_path):
    LatentCache(tmp_path).get("aa11", lambda: latents(1))
    assert same(LatentCache(tmp_path).get("aa11", forbidden), latents(1))


@pytest.mark.parametrize("damage", ["truncate", "flip a bit", "empty", "other tensors", "garbage"])
def test_damaged_entries_are_computed_again(tmp_path, damage, caplog):
    LatentCache(tmp_path).get("aa11", lambda: latents(1))
    (path,) = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[:-100]
    elif damage == "flip a bit":
        content[-1] ^= 1
    elif damage == "empty":
        content = b""
    elif damage == "garbage":
        content = bytes(range(256)) * 4
    else:
        content = content.replace(b'"mean"', b'"meen"')
    path.write_bytes(content)
    cache = LatentCache(tmp_path)
    assert same(cache.get("aa11", lambda: latents(1)), latents(1))
    assert str(path) in caplog.text
    assert same(LatentCache(tmp_path).get("aa11", forbidden), latents(1))


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        LatentCache(tmp_path).get("aa11", lambda: latents(1))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_name_the_image(cache, value):
    mean, logvar = latents(1)
    mean[0, 0, 0] = value
    with pytest.raises(ValueError, match=r"not finite for images/a\.png"):
        cache.get("aa11", lambda: Latents(mean, logvar), source="images/a.png")
    assert same(cache.get("aa11", lambda: latents(1)), latents(1))


def test_autograd_graphs_are_not_kept(cache):
    mean, logvar = latents(1)
    assert not cache.get("aa11", lambda: Latents(mean.requires_grad_(), logvar)).mean.requires_grad


BASE = {"digest": "d", "framing": frame((100, 150), (64, 64)), "background": "white", "vae": "v"}


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "e"},
        {"background": "black"},
        {"vae": "w"},
        {"framing": frame((100, 150), (64, 96))},
        {"framing": frame((100, 150), (64, 64), flip=True)},
        {"framing": frame((100, 150), (64, 64))._replace(left=0)},
        {"framing": frame((100, 150), (64, 64))._replace(top=1)},
    ],
)
def test_keys_change_with_everything_that_makes_the_latents(change):
    assert latent_key(**BASE) == latent_key(**BASE)
    assert latent_key(**{**BASE, **change}) != latent_key(**BASE)


@given(st.lists(st.text(), min_size=3, max_size=3), st.lists(st.text(), min_size=3, max_size=3))
def test_keys_keep_their_parts_apart(one, other):
    def key(parts):
        return latent_key(parts[0], BASE["framing"], parts[1], parts[2])

    assert (key(one) == key(other)) == (one == other)
