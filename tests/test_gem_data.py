"""Reading pairs: every kind of bad line is one error with file, line and remedy; prompts, splits and padding."""

import json

import pytest
import torch
from gem_tiny import tiny_tokenizer

from gem.data import check_lengths, collate, prompt_format, read_pairs, split_pairs
from gem.errors import UserError

GOOD = {"prompt": "1 + 1?", "chosen": "Final Answer: 2", "rejected": "Final Answer: 3"}


def write(path, *lines):
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "a", ', ["not valid JSON", "one complete JSON object per line"]),
        (b"\xff\xfe{}", ["UTF-8"]),
        ([1, 2], ["JSON object is expected", "list"]),
        ({"prompt": "a", "chosen": "b"}, ['"rejected" is missing', '"prompt", "chosen" and "rejected"']),
        ({**GOOD, "chosen": "  "}, ['"chosen" is empty', "delete this line"]),
        ({**GOOD, "chosen": "\ud83d"}, ['"chosen" holds half a character']),
        ({**GOOD, "rejected": 3}, ['"rejected" must be text', "int"]),
        ({**GOOD, "rejected": GOOD["chosen"]}, ["same text"]),
        ({**GOOD, "answer": ""}, ['"answer" is empty']),
        ({**GOOD, "answer": [1]}, ['"answer" must be', "list"]),
    ],
)
def test_a_bad_line_is_one_error_with_file_line_and_remedy(tmp_path, line, words):
    path = write(tmp_path / "pairs.jsonl", GOOD, b"", line, GOOD)
    with pytest.raises(UserError) as error:
        read_pairs(path)
    message = str(error.value)
    assert message.startswith(f"{path}:3: ") and "\n" not in message
    for word in words:
        assert word in message


def test_all_bad_lines_are_in_the_one_error(tmp_path):
    path = write(tmp_path / "pairs.jsonl", b"{", GOOD, b"[", {"prompt": 1})
    with pytest.raises(UserError, match=r":1: not valid JSON .*2 more bad: line 3, 4"):
        read_pairs(path)


def test_no_pairs_and_no_file(tmp_path):
    with pytest.raises(UserError, match="no pairs"):
        read_pairs(write(tmp_path / "empty.jsonl", b""))
    with pytest.raises(UserError, match="cannot read"):
        read_pairs(tmp_path / "none.jsonl")


def test_a_prompt_longer_than_the_context_names_its_line(tmp_path):
    pairs = read_pairs(write(tmp_path / "p.jsonl", GOOD, {**GOOD, "prompt": "x" * 300}))
    form = prompt_format(tiny_tokenizer(), "")
    with pytest.raises(UserError, match=r"p\.jsonl:2: the prompt has \d+ tokens .* context of 256: shorten"):
        check_lengths(pairs, form, 256, 16)
    assert len(check_lengths(pairs, form, 512, 16)) == 2


def test_answer_may_be_a_number(tmp_path):
    assert read_pairs(write(tmp_path / "p.jsonl", {**GOOD, "answer": 2}))[0].answer == "2"


def test_prompts_follow_the_chat_template_and_answers_close_the_turn():
    tokenizer = tiny_tokenizer()
    form = prompt_format(tokenizer, "Think.")
    assert tokenizer.decode(form.prompt_ids("Why?")) == (
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(form.answer_ids("So.")) == "So.<|im_end|>"


def test_the_template_and_not_eos_says_how_a_turn_ends():
    """Base models keep <|endoftext|> as eos while their chat template closes turns with another token."""
    tokenizer = tiny_tokenizer()
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<pad>"
    assert prompt_format(tokenizer, "").end_of_turn == end_of_turn


def test_a_template_without_system_role_gets_the_system_prompt_in_the_question():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = tiny_tokenizer(template + "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    assert tokenizer.decode(prompt_format(tokenizer, "Think.").prompt_ids("Why?")) == (
        "<|im_start|>Think.\n\nWhy?<|im_end|>"
    )


def test_without_a_template_the_format_is_plain():
    tokenizer = tiny_tokenizer(chat_template=None)
    form = prompt_format(tokenizer, "Think.")
    assert tokenizer.decode(form.prompt_ids("Why?")) == "Think.\n\nQuestion: Why?\nAnswer:\n"
    assert form.end_of_turn == tokenizer.eos_token_id


def test_the_split_keeps_a_prompt_on_one_side(tmp_path):
    rows = [{**GOOD, "prompt": f"q{i // 2}", "chosen": f"c{i}"} for i in range(20)]
    train, held = split_pairs(read_pairs(write(tmp_path / "p.jsonl", *rows)), 0.3, seed=1)
    assert len(held) == 6 and len(train) == 14
    assert not {p.prompt for p in train} & {p.prompt for p in held}
    assert split_pairs([*train, *held], 0.3, seed=1)[1] == sorted(held, key=[*train, *held].index)


def test_padding_is_left_for_prompts_and_right_for_completions():
    batch = collate([[1, 2, 3], [4]], [[5], [6, 7], [8, 9, 10], [11]], pad_id=0)
    assert batch.num_generations == 2
    assert batch.prompt_ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert batch.prompt_mask.tolist() == [[True, True, True], [False, False, True]]
    assert batch.completion_ids.tolist() == [[5, 0, 0], [6, 7, 0], [8, 9, 10], [11, 0, 0]]
    assert batch.lengths.tolist() == [1, 2, 3, 1]
    part = batch.select_prompts(0, 1)
    assert part.completion_ids.tolist() == [[5, 0], [6, 7]] and torch.equal(part.prompt_ids, batch.prompt_ids[:1])
    assert batch.select_prompts(1, 2).prompt_ids.tolist() == [[4]]
