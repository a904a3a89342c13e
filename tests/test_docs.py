"""The Python in README.md and docs/ runs as it stands, on the demo model."""

import re
from pathlib import Path

import pytest

from jaxinfer import weights

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
NEEDS_SERVER = "50051"
BLOCKS = [
    pytest.param(
        block,
        id=f"{page.stem}-{number}",
        marks=[] if page.stem == "README" else [pytest.mark.full],
    )
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    if NEEDS_SERVER not in block
]


@pytest.mark.skipif(
    not weights.is_ready("smollm2-135m"), reason="the demo model is not here; scripts/demo gets it"
)
@pytest.mark.parametrize("block", BLOCKS)
def test_examples_run(block, capsys):
    exec(compile(block, "example", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip()
