import torch

from dora_mm.utils.digest import module_digest


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
