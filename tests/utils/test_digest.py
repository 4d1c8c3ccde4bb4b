import torch
from safetensors.torch import save_file

from dora_mm.utils.digest import module_digest, weights_digest


def test_the_digest_changes_with_dtype_and_values():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4))
    before = module_digest(module)
    assert module_digest(module) == before
    assert module_digest(module.to(torch.bfloat16)) != before
    module.to(torch.float32)
    with torch.no_grad():
        module[1].bias[0] = 1e-30
    assert module_digest(module) != before


def test_the_digest_of_weights_does_not_depend_on_their_files(tmp_path):
    tensors = {"b": torch.randn(3, 4).bfloat16(), "a": torch.arange(5), "c": torch.zeros(0, 2)}
    together, first, second = (tmp_path / f"{name}.safetensors" for name in ("together", "first", "second"))
    save_file(tensors, together, {"format": "pt"})
    save_file({"a": tensors["a"], "c": tensors["c"]}, second)
    save_file({"b": tensors["b"]}, first)
    assert weights_digest([together]) == weights_digest([first, second]) == weights_digest([second, first])
    save_file({"b": -tensors["b"]}, first)
    assert weights_digest([together]) != weights_digest([first, second])
