"""Hugging Face model folders: the model, calibration inputs from a text, and example inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.checkpoints import read_weights
from sparsecomp.experts import split_experts_

_CHARACTERS = 16
"""Read for every token wanted: a few times what tokens are long, so that a text of any length costs little."""


def load_model(folder: Path) -> nn.Module:
    """The model of a folder, of the class that its configuration names, in evaluation mode.

    Experts in one weight are taken apart. Sparse checkpoints of compressed-tensors are read too. No code of the folder
    is run.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no config.json.
        ValueError: transformers is missing or cannot read it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the one that holds config.json and the weights")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give the folder of a Hugging Face model")
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        model_class = _model_class(transformers, config)
        if _is_compressed(config):
            del config.quantization_config
            model = model_class.from_pretrained(None, config=config, state_dict=read_weights(folder))
        else:
            model = model_class.from_pretrained(folder, config=config, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"transformers cannot read {folder}: {error}") from error
    result: nn.Module = model.eval()
    split_experts_(result)
    return result


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError("reading a model folder needs transformers: pip install 'sparsecomp[models]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _model_class(transformers: Any, config: Any) -> Any:
    """With its head, so that a pruned model is saved whole."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModel._model_mapping[type(config)]


def _is_compressed(config: Any) -> bool:
    details = getattr(config, "quantization_config", None)
    return isinstance(details, dict) and details.get("quant_method") == "compressed-tensors"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        ValueError: there is none that transformers can read.
    """
    try:
        return _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"transformers cannot read a tokenizer in {folder}: {error}") from error


def text_batches(tokenizer: Any, file: Path, *, sequences: int, tokens: int, batch: int = 8) -> list[dict[str, Tensor]]:
    """Calibration inputs from a text file: its tokens cut into sequences of one length.

    Args:
        tokenizer: of the model; it adds what belongs around a sequence.
        file: UTF-8 text.
        sequences: how many at most; more of the text is not read.
        tokens: of every sequence.
        batch: sequences of one batch.

    Returns:
        Batches `{"input_ids": int64 [batch, tokens]}`; the last may be smaller.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no UTF-8 text, or shorter than one sequence.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not a file; give a text to calibrate on")
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(_CHARACTERS * sequences * tokens)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: {error}") from error
    encoded = tokenizer(text, truncation=True, max_length=tokens, return_overflowing_tokens=True)
    rows = [row for row in encoded["input_ids"] if len(row) == tokens][:sequences]
    if not rows:
        raise ValueError(
            f"{file} is shorter than one sequence of {tokens} tokens: give a longer text or fewer --tokens"
        )
    return [{"input_ids": ids} for ids in torch.tensor(rows).split(batch)]


def example_input(model: Any, batch: int, tokens: int) -> Tensor:
    """An input for a model: token numbers `[batch, tokens]`, or pictures `[batch, channels, size, size]`.

    Raises:
        ValueError: the model takes something else, or fewer tokens.
    """
    config = model.config
    if model.main_input_name == "input_ids":
        check_length(model, tokens)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, config.vocab_size, (batch, tokens), generator=generator)
    if model.main_input_name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        return torch.zeros(batch, getattr(config, "num_channels", 3), config.image_size, config.image_size)
    raise ValueError(
        f"the model's input is {model.main_input_name!r}; this command makes texts (input_ids) and pictures "
        f"(pixel_values); for others call sparsecomp.explain(model, *inputs) from Python"
    )


def check_length(model: Any, tokens: int) -> None:
    """Check that a model takes so many tokens.

    Raises:
        ValueError: it does not.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(f"the model takes at most {limit} tokens, given --tokens {tokens}")
