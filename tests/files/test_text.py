"""Text encoders from every layout, on tiny random ones made here."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import model.text
from model.flux import FluxConfig
from model.text import TextEncoders, check_widths, load_text_encoders, unknown_words
from model.weights import ModelFiles, find_model

PROMPTS = ["a red fox sits on a hill", ""]
ROOT = Path(__file__).resolve().parents[2]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_tokenizers(root, t5_limit=12):
    from transformers import CLIPTokenizer, T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)] + [(c, -3.0) for c in LETTERS]
    limit = {} if t5_limit is None else {"model_max_length": t5_limit}
    T5Tokenizer(vocab=vocabulary, extra_ids=0, **limit).save_pretrained(root / "tokenizer_2")
    # byte-pair pieces in CLIP's form; the end of text is not the highest id, so that argmax would miss it
    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(c + "</w>" for c in LETTERS)]
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (root / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    assert CLIPTokenizer.from_pretrained(root / "tokenizer").eos_token_id == 1


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub folder with tiny encoders, and their networks as transformers made them."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    root = tmp_path_factory.mktemp("hub")
    make_tokenizers(root)
    torch.manual_seed(0)
    sizes = dict(d_model=40, d_kv=16, d_ff=48, num_layers=2, num_heads=3, relative_attention_num_buckets=8)
    t5 = T5EncoderModel(T5Config(vocab_size=30, feed_forward_proj="gated-gelu", **sizes)).eval()
    t5.save_pretrained(root / "text_encoder_2")
    sizes = dict(hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=54, max_position_embeddings=20, **sizes, **ids)).eval()
    clip.save_pretrained(root / "text_encoder")
    return root, t5, clip


def files(root, **parts) -> ModelFiles:
    paths = dict(clip="text_encoder", t5="text_encoder_2", clip_tokenizer="tokenizer", t5_tokenizer="tokenizer_2")
    paths |= dict(flux="flux1-dev.safetensors", autoencoder="ae.safetensors") | parts
    return ModelFiles(**{part: root / path for part, path in paths.items()}, root=root, name="tiny")


def encode(root, prompts=PROMPTS, **parts):
    return load_text_encoders(files(root, **parts), dtype=torch.float32).encode(prompts, 16)


@pytest.fixture
def copy(hub, tmp_path):
    return shutil.copytree(hub[0], tmp_path / "copy")


def test_encoding_is_what_transformers_gives_without_masks(hub):
    root, t5, clip = hub
    encoders = load_text_encoders(files(root), dtype=torch.float32)
    txt, vec = encoders.encode(PROMPTS, 16)
    padded = dict(padding="max_length", truncation=True, return_tensors="pt")
    t5_ids = encoders.t5_tokenizer(PROMPTS, max_length=16, **padded).input_ids
    clip_ids = encoders.clip_tokenizer(PROMPTS, max_length=20, **padded).input_ids
    assert t5_ids[1].tolist() == [1] + [0] * 15 and clip_ids[1].tolist() == [0] + [1] * 19
    with torch.no_grad():
        torch.testing.assert_close(txt, t5(t5_ids).last_hidden_state)
        torch.testing.assert_close(vec, clip(clip_ids).pooler_output)
    assert txt.shape == (2, 16, 40) and vec.shape == (2, 128)
    assert not vec[0].allclose(vec[1])


def test_hub_folder_shards_and_single_files_give_identical_outputs(hub, copy, monkeypatch):
    _, t5, _ = hub
    want = encode(copy)
    shutil.rmtree(copy / "text_encoder_2")
    t5.save_pretrained(copy / "text_encoder_2", max_shard_size="20KB")
    assert len(list((copy / "text_encoder_2").glob("model-*.safetensors"))) > 2
    sharded = encode(copy)
    t5.save_pretrained(copy / "whole")
    tensors = load_file(copy / "whole" / "model.safetensors")
    both = tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}
    save_file(both | {"lm_head.weight": torch.zeros(2, 2)}, copy / "t5xxl_fp16.safetensors")
    tensors = load_file(copy / "text_encoder" / "model.safetensors")
    released = {"text_model." + key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    released["text_model.embeddings.position_ids"] = torch.arange(20)[None]
    released["text_projection.weight"] = torch.zeros(2, 2)
    save_file(released, copy / "clip_l.safetensors")
    for kind, folder in (("clip", "text_encoder"), ("t5", "text_encoder_2")):
        known = (
            json.loads((copy / folder / "config.json").read_text()) if (copy / folder / "config.json").exists() else {}
        )
        monkeypatch.setitem(model.text.KNOWN, kind, known)
        shutil.rmtree(copy / folder)
    single = encode(copy, clip="clip_l.safetensors", t5="t5xxl_fp16.safetensors")
    for got in (sharded, single):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_the_two_t5_embeddings_are_one_tensor_in_memory(hub):
    t5 = load_text_encoders(files(hub[0]), dtype=torch.bfloat16).t5
    assert t5.encoder.embed_tokens.weight is t5.shared.weight
    assert {p.dtype for p in t5.parameters()} == {torch.bfloat16} and not any(p.requires_grad for p in t5.parameters())


def test_t5_never_computes_in_float16(hub):
    encoders = load_text_encoders(files(hub[0]), dtype=torch.float16)
    assert {p.dtype for p in encoders.t5.parameters()} == {torch.bfloat16}
    assert {part.dtype for part in encoders.encode(PROMPTS, 16)} == {torch.float16}


def test_config_beside_the_file_gives_what_shapes_do_not_show(copy):
    config = copy / "text_encoder" / "config.json"
    want = encode(copy)[1]
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"num_attention_heads": 4}))
    assert not torch.allclose(encode(copy)[1], want)
    config.write_text(json.dumps(settings | {"num_attention_heads": 10**9}))
    with pytest.raises(ValueError, match="text_encoder/model.safetensors does not load .*; download its folder again"):
        encode(copy)
    config.write_text('{"num_attention_heads": ')
    with pytest.raises(ValueError, match="config.json is not a JSON object"):
        encode(copy)


@pytest.fixture(params=["folder", "single file"])
def of_kind(request, copy, monkeypatch):
    """Say where an encoder's tensors lie, in a folder or a single file of known configuration, and encode with it."""

    def prepare(kind):
        part = {"clip": "text_encoder", "t5": "text_encoder_2"}[kind]
        path = copy / part / "model.safetensors"
        if request.param == "folder":
            return path, lambda: encode(copy)
        monkeypatch.setitem(model.text.KNOWN, kind, json.loads((copy / part / "config.json").read_text()))
        single = path.rename(copy / f"{kind}.safetensors")
        shutil.rmtree(copy / part)
        return single, lambda: encode(copy, **{kind: single.name})

    return prepare


STRICT = {"clip": "encoder.layers.1.mlp.fc2.bias", "t5": "encoder.block.1.layer.1.DenseReluDense.wo.weight"}


@pytest.mark.parametrize("kind", STRICT)
def test_missing_unexpected_and_misshapen_tensors_are_refused(of_kind, kind):
    (path, use), name = of_kind(kind), STRICT[kind]
    use()  # else the test could not fail
    tensors = load_file(path)
    (key,) = (key for key in tensors if key.endswith(name))
    save_file({k: tensor for k, tensor in tensors.items() if k != key}, path)
    with pytest.raises(ValueError, match=rf"{path.name} lacks {name} \(1 tensors\)$"):
        use()
    more = key.replace(".1.", ".7.", 1)
    save_file(tensors | {more: tensors[key].clone()}, path)
    with pytest.raises(ValueError, match=rf"{path.name} has the unexpected {more} \(1 tensors\)$"):
        use()
    save_file(tensors | {key: tensors[key][:-1].clone()}, path)
    with pytest.raises(ValueError, match=f"{path.name} does not load .*download its folder again$") as error:
        use()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", STRICT)
def test_names_with_a_foreign_prefix_are_refused_not_ignored(of_kind, kind):
    path, use = of_kind(kind)
    save_file({"module." + key: tensor for key, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=f"{path.name} holds no network that is known here"):
        use()


def test_t5_in_other_quantisation_is_refused_by_name(copy):
    path = copy / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"shared.weight.absmax": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="holds bitsandbytes nf4 .*, not a T5 text encoder; use .*t5xxl_fp16.safeten"):
        encode(copy)
    save_file({key: tensor.to(torch.int8) for key, tensor in tensors.items()}, path)
    with pytest.raises(ValueError, match="as I8, which is no float of 16 bits or more"):
        encode(copy)


def test_how_much_of_a_prompt_is_read_is_told(hub):
    encoders = load_text_encoders(files(hub[0]), dtype=torch.float32)
    long = "red fox on hills of blue snow and more to come"
    # 36 letters, 11 starts of words, the end of text
    lines = encoders.doubts(["a fox", long, long], 10, "tiny")
    assert lines[0] == "T5 reads 10 of the prompt's 48 tokens; shorten it"
    assert not [line for line in lines[1:] + encoders.doubts(["a fox"], 16, "tiny") if line.startswith("T5")]


def test_text_length_defaults_to_the_tokenizers_own(hub, tmp_path):
    assert load_text_encoders(files(hub[0]), dtype=torch.float32).encode(["a"], None)[0].shape[1] == 12
    make_tokenizers(tmp_path, t5_limit=None)
    for part in ("text_encoder", "text_encoder_2"):
        shutil.copytree(hub[0] / part, tmp_path / part)
    with pytest.raises(ValueError, match="the T5 tokenizer has no model_max_length; give the text length"):
        load_text_encoders(files(tmp_path), dtype=torch.float32).encode(["a"], None)


def test_prompts_that_cannot_be_encoded_are_refused(hub, copy):
    encoders = load_text_encoders(files(hub[0]), dtype=torch.float32)
    encoders.encode(["\x00 \u4e2d\u6587 \U0001f600 </s> <pad>"], 16)
    path = copy / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path)
    save_file({key: t[:20].clone() if t.shape[0] == 30 else t for key, t in tensors.items()}, path)
    config = copy / "text_encoder_2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 20}))
    with pytest.raises(ValueError, match="T5 tokenizer makes token 29, but the T5 encoder knows 20"):
        encode(copy, ["zebra"])


@pytest.mark.parametrize("file", ["tokenizer_2/tokenizer.json", "tokenizer/vocab.json", "tokenizer/merges.txt"])
def test_a_damaged_tokenizer_is_one_line(copy, file):
    path = copy / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"\xff{") if "json" in file else path.unlink()
    with pytest.raises(ValueError, match="the tokenizer in .*tokenizer.* cannot be read") as error:
        encode(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", bytes(5000), b"\xff\x00junk" * 300])
def test_a_lone_damaged_spiece_model_is_one_line_that_says_what_is_missing(copy, content, capfd):
    (copy / "tokenizer_2" / "tokenizer.json").unlink()
    (copy / "tokenizer_2" / "spiece.model").write_bytes(content)
    with pytest.raises(
        ValueError, match="tokenizer_2 cannot be read .*; pip install sentencepiece protobuf, or"
    ) as error:
        encode(copy)
    assert "tiktoken" not in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["sentencepiece", "google.protobuf"])
def test_what_a_lone_spiece_model_needs_is_named_where_it_is_not_installed(copy, module):
    for name in ("spiece.model", "tokenizer_config.json"):
        shutil.copy(ROOT / "weights" / "tiny" / "tokenizer_2" / name, copy / "tokenizer_2")
    (copy / "tokenizer_2" / "tokenizer.json").unlink()
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from transformers.models.t5.tokenization_t5 import T5Tokenizer\n"
        "from pathlib import Path; from model.text import load_tokenizer\n"
        "try: load_tokenizer(T5Tokenizer, Path(sys.argv[1]))\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(copy / "tokenizer_2")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install sentencepiece protobuf" in done.stdout and "tiktoken" not in done.stdout
    assert done.stdout.count("\n") == 1 and done.stderr == ""


@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json", "spiece.model"])
def test_a_pipe_among_the_tokenizers_files_does_not_hang(copy, name):
    os.mkfifo(copy / "tokenizer_2" / name)
    with pytest.raises(ValueError, match=f"{name} is no file of at most 16 MB; download the folder tokenizer_2/ again"):
        encode(copy)


def test_loading_asks_nothing_of_the_network_and_prints_nothing(hub, monkeypatch, capfd):
    def refuse(*_):
        raise AssertionError("connected")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    encoders = load_text_encoders(files(hub[0]), dtype=torch.float32)
    encoders.doubts(["a fox " * 50], 12, "tiny")
    encoders.encode(["a fox " * 50], 12)
    assert capfd.readouterr() == ("", "")


def test_the_configurations_of_single_files_are_those_of_the_released_encoders():
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(**model.text.KNOWN["t5"]))
        clip = CLIPTextModel(CLIPTextConfig(**model.text.KNOWN["clip"]))
    assert sum(p.numel() for p in t5.parameters()) == 4_762_310_656
    assert sum(p.numel() for p in clip.parameters()) == 123_060_480


def test_words_that_are_read_letter_by_letter_are_told():
    encoders = load_text_encoders(find_model("tiny"), dtype=torch.float32)
    prompt = "[IMAGE1] an astronaut riding a red cat; A cat on a beach."
    assert unknown_words(encoders.t5_tokenizer, [prompt]) == ["astronaut", "riding"]


def test_a_word_in_pieces_that_are_more_than_letters_is_known():
    pieces = {"fox": ["\u2581", "f", "o", "x"], "walks": ["\u2581wa", "lk", "s"], "cat": ["\u2581c", "a", "t"]}
    encoders = TextEncoders(None, None, SimpleNamespace(tokenize=pieces.get), None, torch.float32)
    assert unknown_words(encoders.t5_tokenizer, ["a fox walks, [a fox", "or] cat"]) == ["fox", "cat"]


def test_encoders_of_another_model_are_told_with_both_widths():
    config = FluxConfig(64, 64, 6, 5, 32, 48, 1, 1, 1, (4, 14, 14), True)
    check_widths(torch.zeros(1, 3, 5), torch.zeros(1, 6), config, "mine")
    with pytest.raises(ValueError, match="beside mine give widths 7 and 6, but its transformer takes 5 and 6"):
        check_widths(torch.zeros(1, 3, 7), torch.zeros(1, 6), config, "mine")
