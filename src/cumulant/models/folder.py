"""Files that make a saved folder loadable by any program, besides weights and configuration.

`auto_map` in the configuration names classes in a module. The module is one line, which imports
them from the installed package. A README says how to load the model.
"""

from __future__ import annotations

import os
from pathlib import Path

MODULE = "modeling_cumulant"
CLASSES = {
    "AutoConfig": "CumulantConfig",
    "AutoModel": "CumulantModel",
    "AutoModelForCausalLM": "CumulantForCausalLM",
    "AutoModelForMaskedLM": "CumulantForMaskedLM",
    "AutoModelForSequenceClassification": "CumulantForSequenceClassification",
    "AutoModelForTokenClassification": "CumulantForTokenClassification",
    "AutoModelForQuestionAnswering": "CumulantForQuestionAnswering",
}
TASKS = {
    "CumulantForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "CumulantForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "CumulantForSequenceClassification": (
        "AutoModelForSequenceClassification",
        "text-classification",
    ),
    "CumulantForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "CumulantForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
}
CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [cumulant, linear-attention]
---

# {title}

A language model of Cumulant, linear-time attention for PyTorch{preset}.

```
pip install 'cumulant[text]'
```

```python
import cumulant.models  # or trust_remote_code=True, which imports it for you
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
```

Replace `{title}` by where this folder is. `trust_remote_code=True` runs the one line of
`{module}.py`, an import from the installed package; nothing else in this folder is code.
"""


def auto_map(given: dict[str, str] | None) -> dict[str, str]:
    """The `auto_map` of a configuration. Its entries for classes of others stay."""
    ours = {auto: f"{MODULE}.{name}" for auto, name in CLASSES.items()}
    others = {auto: name for auto, name in (given or {}).items() if f"{MODULE}." not in name}
    return {**ours, **others}


def write_module(folder: Path) -> None:
    """Write the module that `auto_map` names."""
    names = ", ".join(sorted(set(CLASSES.values())))
    _write_atomically(folder / f"{MODULE}.py", f"from cumulant.models import {names}  # noqa\n")


def write_card(folder: Path, architecture: str, preset: str | None) -> None:
    """Write a README that says how to load the model, unless there is a README already."""
    if (folder / "README.md").exists():
        return
    auto, task = TASKS.get(architecture, ("AutoModel", "feature-extraction"))
    mechanism = "" if preset is None else f" (preset `{preset}`)"
    title = folder.resolve().name
    _write_atomically(
        folder / "README.md",
        CARD.format(title=title, auto=auto, task=task, preset=mechanism, module=MODULE),
    )


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
