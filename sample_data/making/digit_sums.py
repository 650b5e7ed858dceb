"""The task of the tiny models: add digits, and show the work.

    3+8+5=   ->  3 11 16;16<eos>          running sums, then the answer
    3+8+5=   ->  ;16<eos>                 the answer at once
    3+8+5?   ->  [3+8]11[11+5]16;16<eos>  with a calculator: the environment writes what follows each "]"

The answer is what stands between the last ";" and the end, so a reward can be checked. Demonstrations come from a
careless pupil who is off by one now and then: there is something left for the policy gradient to learn.
"""

from __future__ import annotations

import random
import re

PAD, EOS = 0, 1
VOCABULARY = ["<pad>", "<eos>", *"0123456789", *"+=?; []"]
VOCAB_SIZE = len(VOCABULARY)
_ID = {symbol: index for index, symbol in enumerate(VOCABULARY)}
_CALL = re.compile(r"\[(\d{1,3})\+(\d{1,3})\]$")


def encode(text: str) -> list[int]:
    """Token ids of a text, one per character."""
    return [_ID[character] for character in text]


def decode(ids: list[int]) -> str:
    """The characters of token ids, special tokens left out."""
    return "".join(VOCABULARY[i] for i in ids if i not in (PAD, EOS))


def make_prompt(rng: random.Random, num_terms: int, *, calculator: bool) -> str:
    """A sum of `num_terms` digits, ending in "=" or, where a calculator is at hand, "?"."""
    return "+".join(str(rng.randint(1, 9)) for _ in range(num_terms)) + ("?" if calculator else "=")


def correct_answer(prompt: str) -> int:
    """The sum that a prompt asks for."""
    return sum(int(term) for term in prompt[:-1].split("+"))


def reward(prompt: str, response_ids: list[int]) -> float:
    """1 if the response ends properly and the number after its last ";" is the sum, otherwise 0."""
    _, semicolon, answer = decode(response_ids).rpartition(";")
    ended = bool(response_ids) and response_ids[-1] == EOS
    return float(ended and bool(semicolon) and answer == str(correct_answer(prompt)))


def observation(response_ids: list[int]) -> list[int]:
    """What the calculator writes after the response so far; nothing unless it ends in a call such as "[3+8]"."""
    call = _CALL.search(decode(response_ids))
    return encode(str(int(call[1]) + int(call[2]))) if call else []


def demonstrate(rng: random.Random, prompt: str) -> tuple[list[int], list[bool]]:
    """Response ids of the careless pupil and, per token, whether he wrote it (False: the calculator did)."""
    terms = [int(term) for term in prompt[:-1].split("+")]
    if prompt.endswith("?"):
        pieces = _calculator_pieces(rng, terms)
    elif rng.random() < 0.65:
        sums = _careless_sums(rng, terms)
        pieces = [(" ".join(map(str, sums)) + f";{sums[-1]}", True)]
    else:
        pieces = [(f";{_careless_sums(rng, terms)[-1]}", True)]
    ids = [i for text, _ in pieces for i in encode(text)]
    own = [flag for text, flag in pieces for _ in text]
    return [*ids, EOS], [*own, True]


def _careless_sums(rng: random.Random, terms: list[int]) -> list[int]:
    sums = [terms[0]]
    for term in terms[1:]:
        slip = rng.choice((-1, 1)) if rng.random() < 0.12 else 0
        sums.append(max(0, sums[-1] + term + slip))
    return sums


def _calculator_pieces(rng: random.Random, terms: list[int]) -> list[tuple[str, bool]]:
    total, pieces = terms[0], []
    for term in terms[1:]:
        typed = rng.randint(1, 9) if rng.random() < 0.12 else term
        pieces += [(f"[{total}+{typed}]", True), (str(total + typed), False)]
        total += typed
    return [*pieces, (f";{total}", True)]
