"""The public list: every name is there, and importing the package loads nothing heavy."""

import subprocess
import sys

import pytest

import gspo


@pytest.mark.parametrize("name", gspo.__all__)
def test_public_name_is_what_its_module_has(name):
    assert getattr(gspo, name).__name__ == name
    assert name in dir(gspo)


def test_public_list_is_sorted_and_has_no_others():
    assert list(gspo.__all__) == sorted(gspo.__all__)
    with pytest.raises(AttributeError, match="module 'gspo' has no attribute 'GSPOLos'"):
        gspo.GSPOLos  # noqa: B018


def test_import_is_light():
    code = (
        "import gspo, sys; print(sorted(sys.modules.keys() & {'torch', 'torchtune', 'pydantic'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
