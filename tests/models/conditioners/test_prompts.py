import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from uae.miniature.tiny import processor, tokenizer
from uae.models.conditioners.prompts import chat_template, check_template, prompt_ids

KEY = "model.init_args.system.init_args.condition_tokens"
DEFAULT = "<|im_start|>system\nBe helpful.<|im_end|>\n"
END = "<|im_end|>\n<|im_start|>assistant\n"
CHATML = (  # strings or parts, and a system turn of its own where there is none
    "{%- for m in messages -%}{%- if loop.first and m.role != 'system' -%}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}"
    "{%- endif -%}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.content is string -%}{{ m.content }}{%- else -%}"
    "{%- for part in m.content -%}{%- if 'text' in part -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
STRINGS = (  # adding a list to a string is an error
    "{%- for m in messages -%}{{ '<' + m.role + '>' + m.content + '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}"
)
PARTS = (  # a string has no parts, so nothing is printed
    "{%- for m in messages -%}{{ m.role + ':' }}{%- for part in m.content | selectattr('type', 'equalto', 'text') -%}"
    "{{ part.text }}{%- endfor -%}{{ ';' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ 'assistant:' }}{%- endif -%}"
)
FOLDED = (  # the system message becomes a part of the user's turn
    "{%- set first = messages[0].content if messages[0].role == 'system' else '' -%}{%- for m in messages -%}"
    "{%- if m.role != 'system' -%}{{ '[' + first + m.content + ']' }}{%- endif -%}{%- endfor -%}{{ first }}"
)


KEY = "model.init_args.system.init_args.condition_tokens"


def words(template):
    made = tokenizer()
    made.chat_template = template
    return made


@pytest.mark.parametrize("create", [tokenizer, processor])
def test_the_official_shape(create):
    chatml = create()
    chatml.chat_template = CHATML
    assert chat_template(chatml, "generate") == f"{DEFAULT}<|im_start|>generate\n{{caption}}{END}"  # UAE
    assert chat_template(chatml, system=False) == f"<|im_start|>user\n{{caption}}{END}"  # UniWorld-V1
    text = "Draw: {caption} <b>&'\"{{x}}"
    assert chat_template(chatml, system="Look & say.", text=text) == (
        f"<|im_start|>system\nLook & say.<|im_end|>\n<|im_start|>user\n{text}{END}"
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (STRINGS, "<generate>{caption}\n<assistant>"),
        (PARTS, "generate:{caption};assistant:"),
    ],
)
def test_content_as_the_template_takes_it(template, expected):
    assert chat_template(words(template), "generate") == expected
    assert chat_template(words(template), "generate", system=False) == expected  # there is none to cut off


def test_the_miniatures_template():
    expected = "<|im_start|> generate {caption} <|im_end|> <|im_start|> assistant"
    assert chat_template(processor(), "generate") == expected
    assert chat_template(processor(), "generate", system=False) == expected


def test_templates_that_cannot_serve_are_refused():
    with pytest.raises(ValueError, match="has no chat template: point the system at an instruction-tuned checkpoint"):
        chat_template(tokenizer())
    with pytest.raises(ValueError, match=r"does not show '\{caption\}' in a message of role 'generate'"):
        chat_template(words("{{ 'hello' }}"), "generate")
    with pytest.raises(ValueError, match="no system turn before the message, so system=False cannot cut it off"):
        chat_template(words(FOLDED), system=False)
    for template in ("draw it", "{caption} {caption}"):
        with pytest.raises(ValueError, match="must have one"):
            check_template(template)


# -------------------------------------------------------------------------------------------------------- token ids


@pytest.fixture(scope="module", params=["bytes", "spaces"])
def pieces(request):
    """Byte pairs as in Qwen, where a space belongs to the next word; and as in SentencePiece, where the first has one, too."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    split = {"bytes": pre_tokenizers.ByteLevel(add_prefix_space=False), "spaces": pre_tokenizers.Metaspace()}
    bpe.pre_tokenizer = split[request.param]
    specials = ["<unk>", "<|im_start|>", "<|im_end|>"]
    texts = ["draw a red square and a blue ring, please", "a red ring and a blue square. now draw"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=330, special_tokens=specials, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", additional_special_tokens=specials[1:])


def test_a_long_caption_loses_its_own_end(pieces):
    template = "<|im_start|>draw {caption}<|im_end|> now<|im_start|>"
    short, long = "a red ring", "a blue square and a red ring, a blue square, and a red square."
    whole = [pieces(template.replace("{caption}", text), add_special_tokens=False)["input_ids"] for text in (short, long)]
    tail = len(whole[0]) - whole[0].index(pieces.convert_tokens_to_ids("<|im_end|>"))
    assert tail >= 3
    rows, cut = prompt_ids(pieces, template, [short, long], len(whole[1]))
    assert (rows, cut) == (whole, 0)
    limit = len(whole[0]) + 3
    with pytest.warns(UserWarning, match=rf"1 of 2 captions are longer .* max_tokens={limit}: raise {KEY}") as told:
        rows, cut = prompt_ids(pieces, template, [short, long], limit)
    assert len(told) == cut == 1
    assert rows == [whole[0], whole[1][: limit - tail] + whole[1][-tail:]]
    assert rows[1][-tail:] == whole[0][-tail:]  # <|im_end|> now<|im_start|>


def test_every_limit_keeps_the_templates_tail(pieces):
    template, long = "a {caption}<|im_end|>", "red ring and a blue square, please"
    end = pieces.convert_tokens_to_ids("<|im_end|>")
    least = len(pieces("a <|im_end|>", add_special_tokens=False)["input_ids"])
    whole = pieces(template.replace("{caption}", long), add_special_tokens=False)["input_ids"]
    assert len(whole) > least + 3
    for limit in range(least + 1, len(whole)):
        with pytest.warns(UserWarning, match="cut"):
            (row,), cut = prompt_ids(pieces, template, [long], limit)
        assert (len(row), row[-1], cut) == (limit, end, 1)
    with pytest.raises(ValueError, match=rf"max_tokens={least}, but the template alone takes {least} tokens: raise"):
        prompt_ids(pieces, template, [long], least)


def test_braces_in_a_caption_mean_nothing(pieces):
    text = 'a sign "{caption}" {0} {{x}} {'
    (row,), _ = prompt_ids(pieces, "draw {caption}<|im_end|>", [text], 99)
    assert row == pieces("draw " + text + "<|im_end|>", add_special_tokens=False)["input_ids"]
