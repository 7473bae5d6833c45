"""The card of a model (README.md with front matter, as the hub shows it), and the way of a directory to the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.errors import InputError

if TYPE_CHECKING:
    from torch import nn

CARD = "README.md"
LIBRARIES = {"mm": "mm-torch", "hf": "transformers", "open_clip": "open_clip", "timm": "timm", "kyutai": "moshi"}
PIPELINES = {"decoder": "text-generation", "encoder": "feature-extraction", "seq2seq": "text2text-generation",
             "clip": "zero-shot-image-classification", "vit": "image-feature-extraction", "mimi": "audio-to-audio",
             "whisper": "automatic-speech-recognition", "hubert": "feature-extraction",
             "duplex": "audio-to-audio", "csm": "text-to-speech"}
LICENSES = {"MIT License": "mit", "Apache License": "apache-2.0", "Apache-2.0": "apache-2.0"}


def model_card(model: nn.Module, name: str, layout: str, title: str, license: str | None = None) -> str:
    """The text of a model's card. name: of the class that opens it; title: what it is called, such as owner/model;
    license: as the hub abbreviates it, left out where it is not known."""
    count = sum(value.numel() for value in model.parameters())
    classifies = getattr(model, "labels", ())
    facts = {"license": license, "library_name": LIBRARIES.get(layout, LIBRARIES["mm"]),
             "pipeline_tag": "image-classification" if classifies else PIPELINES.get(model.kind)}
    front = [f"{key}: {value}" for key, value in facts.items() if value]
    return "\n".join([
        "---", *front, "tags:", "- mm-torch", f"- {model.kind}", "---", "", f"# {title.rpartition('/')[2]}", "",
        "| | |", "|---|---|", f"| kind | {model.families.names[model.kind]} |", f"| parameters | {count:,} |",
        f"| layout | {layout} |", f"| weights | {str(next(model.parameters()).dtype).removeprefix('torch.')} |", "",
        "```python", "import mm", "", f'model = mm.load("{title}")  # a {name}', "```", ""])


def license_of(folder: Path | None) -> str | None:
    """The licence that a directory states: in its card's front matter, or by the text of its LICENSE file."""
    if folder is None:
        return None
    if (folder / CARD).is_file():
        found = re.search(r"^license:\s*(\S+)", (folder / CARD).read_text("utf-8", "replace"), re.MULTILINE)
        if found:
            return found[1]
    for file in sorted(folder.glob("LICENSE*")):
        head = file.read_text("utf-8", "replace")[:400]
        return next((short for name, short in LICENSES.items() if name in head), None)
    return None


def upload(folder: Path, repository: str, token: str | None = None, private: bool = False) -> None:
    """The files of a directory, in a repository `owner/name` of the hub, which is made where it is not there. Raises
    InputError with the hub's reason."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    try:
        hub: Any = HfApi(token=token)
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{folder} could not be uploaded as {repository} ({reason}); its files are complete") from None
