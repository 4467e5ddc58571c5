from squeezed.vllm.contract import broken
from squeezed.vllm.plugin import is_supported


def test_the_installed_vllm_has_every_name_that_is_used():
    import vllm

    assert is_supported(vllm.__version__)
    assert not list(broken())
