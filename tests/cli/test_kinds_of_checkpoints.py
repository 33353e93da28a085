"""``alds-fast compress DIR --data`` for language models of other kinds than decoders of text alone."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from alds_fast.cli.commands import main

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


def with_pictures():
    """A decoder of texts and pictures."""
    words = transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=16, vocab_size=96)
    pictures = transformers.SiglipVisionConfig(**SIZES, image_size=16, patch_size=8)
    config = transformers.Gemma3Config(
        text_config=words, vision_config=pictures, mm_tokens_per_image=4, image_token_index=95
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def with_encoder():
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2, "vocab_size": 96}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def masked():
    """Of 64 positions at most."""
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, vocab_size=96, max_position_embeddings=64))


@pytest.fixture
def compress(tmp_path):
    """The command's exit code, with tokens of a vocabulary of 96 in tokens.safetensors."""

    def run(build, *options):
        torch.manual_seed(0)
        build().save_pretrained(tmp_path / "dense")
        save_file({"input_ids": torch.randint(96, (40, 16))}, tmp_path / "tokens.safetensors")
        (tmp_path / "mine.py").write_text(
            "import torch\n\n\ndef batches():\n    ids = torch.arange(64).view(4, 16)\n"
            "    return [{'input_ids': ids, 'decoder_input_ids': ids}] * 3\n\n\n"
            "def broken():\n    raise KeyError('nothing here')\n\n\n"
            "def rows():\n    return [{'input_ids': torch.arange(64).view(4, 16)}] * 3\n"
        )
        ours = ".safetensors", ":batches", ":rows", ":broken"
        named = [str(tmp_path / o) if o.endswith(ours) else o for o in options]
        out = str(tmp_path / "small")
        return main(["compress", str(tmp_path / "dense"), "-o", out, "--params", "0.9", *named])

    return run


def test_a_decoder_of_texts_and_pictures_is_a_language_model(compress, tmp_path, capsys):
    texts = "--data", "tokens.safetensors", "--also", "tokens.safetensors", "--sequence", "16"
    assert compress(with_pictures, *texts, "--sensitivity", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["perplexity"].values()
    assert rows and all(1 < value < 1000 for row in rows for value in row)
    assert json.loads((tmp_path / "small" / "alds_job.json").read_text())["sensitivity"] == "kl"


def test_an_encoder_and_a_decoder(compress, capsys):
    assert compress(with_encoder, "--data", "tokens.safetensors") == 1
    assert "T5ForConditionalGeneration has an encoder and a decoder" in capsys.readouterr().err
    assert compress(with_encoder, "--data", "mine.py:batches", "--sensitivity") == 0
    assert "pass --data" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("build", "data"),
    [(with_pictures, "calibration.txt"), (with_encoder, "file.py:function"), (masked, "calibration.txt")],
)
def test_all_say_that_they_need_data(build, data, compress, capsys):
    assert compress(build) == 0
    assert f"pass --data {data} --sensitivity" in capsys.readouterr().out


def test_what_config_json_leaves_out_is_known(compress, tmp_path, capsys):
    """Files of the hub leave out what is a default, here the 512 positions."""
    assert compress(masked, "--data", "tokens.safetensors", "--sequence", "8") == 0
    file = tmp_path / "dense" / "config.json"
    fields = json.loads(file.read_text())
    del fields["max_position_embeddings"]
    file.write_text(json.dumps(fields))
    tokens = str(tmp_path / "tokens.safetensors")
    command = ["compress", str(tmp_path / "dense"), "-o", str(tmp_path / "other"), "--params", "0.9", "--data", tokens]
    assert main([*command, "--sequence", "600"]) == 1
    assert "--sequence 600 is more than the 512 positions" in capsys.readouterr().err


def test_a_function_makes_batches_of_its_own_length(compress, capsys):
    """--sequence, 512 by default, is for texts."""
    assert compress(masked, "--data", "tokens.safetensors") == 1
    assert "--sequence 512 is more than the 64 positions" in capsys.readouterr().err
    assert compress(masked, "--data", "mine.py:rows") == 0
    capsys.readouterr()
    assert compress(masked, "--data", "mine.py:broken") == 1
    assert "mine.py:broken' could not be called: KeyError: 'nothing here'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--data", "--also"])
def test_tokens_of_another_vocabulary_are_refused_before_the_work(compress, capsys, tmp_path, option):
    data = ["--data", "tokens.safetensors"] if option == "--also" else []
    save_file({"input_ids": torch.full((40, 16), 96)}, tmp_path / "other.safetensors")
    assert compress(with_pictures, *data, option, "other.safetensors", "--sequence", "16") == 1
    assert "has tokens from 96 to 96, the model knows those from 0 to 95" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
