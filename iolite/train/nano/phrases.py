"""What is asked and answered, in words. Every kind of question has a few wordings and one form of answer.

The first wording of a list is the commonest. Answers are lower-case; questions are written as people write them,
so `as_typed` sometimes drops the capital, the mark at the end, or the British spelling.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

READ = (
    "What number is this?",
    "What does the sign say?",
    "Read the number.",
    "What number is shown?",
    "Which number do you see?",
    "What is written here?",
    "What does it say?",
    "Read this.",
)
NAME = (
    "What is this?",
    "What do you see?",
    "Describe the picture.",
    "What is in the picture?",
    "Name the shape and its colour.",
    "Which shape and colour is it?",
)
COLOUR = (
    "What colour is it?",
    "What colour is this?",
    "What colour is the shape?",
    "What colour is the {shape}?",
    "Which colour is it?",
    "Name the colour.",
)
SHAPE = (
    "What shape is it?",
    "What shape is this?",
    "Which shape do you see?",
    "What is the shape?",
    "Which shape is it?",
    "Name the shape.",
)
IS_SHAPE = ("Is it a {shape}?", "Is this a {shape}?", "Do you see a {shape}?")
IS_COLOUR = ("Is it {colour}?", "Is this {colour}?", "Is the shape {colour}?")
IS_NUMBER = ("Is it {number}?", "Is this {number}?", "Is the number {number}?")
TRANSCRIBE = (
    "Transcribe the speech.",
    "Transcribe this recording.",
    "Transcribe the audio.",
    "What do you hear?",
    "What number do you hear?",
    "What is said?",
    "Write down the digits.",
    "What did I say?",
)
ANSWER_ALOUD = ("Answer the question.", "Answer the spoken question.", "Answer.")
SEE_AND_HEAR = (
    "What do you see and hear?",
    "Name the shape and the number.",
    "What is shown and what is said?",
)

# Questions without a picture or sound, and their one answer.
TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("What is your name?", "Who are you?", "What are you?", "What are you called?", "Tell me your name."),
        "i am iolite-nano, a very small model.",
    ),
    (
        ("What can you do?", "How can you help me?", "What are you good at?", "Help!", "What do you do?"),
        "i read numbers, name shapes and colours, and write down spoken digits.",
    ),
    (
        ("What can you not do?", "What can't you do?", "What are your limits?", "What are you bad at?"),
        "i do not know the world, and i cannot hold a conversation.",
    ),
    (
        ("Hello!", "Hi!", "Hey!", "Good morning!", "Good evening!", "Hi there!", "Hello there!"),
        "hello! show me a picture or a recording.",
    ),
    (("How are you?", "How are you doing?", "How is it going?"), "i am well, thank you."),
    (("Thank you.", "Thanks!", "Thank you very much!"), "you are welcome."),
    (("Goodbye!", "Bye!", "See you!"), "goodbye!"),
    (
        ("Who made you?", "How were you made?", "Where do you come from?", "Who trained you?"),
        "i was trained from nothing by iolite.",
    ),
    (("Are you human?", "Are you a person?", "Are you a robot?", "Are you real?"), "i am a very small model."),
)
NO_PICTURE = "please show me a picture."
NO_SOUND = "please give me a recording."
UNKNOWN = "i do not know."
UNKNOWN_QUESTIONS = (
    "What is the capital of {place}?",
    "Where is {place}?",
    "Tell me about {place}.",
    "Write a poem about {thing}.",
    "Tell me a story about {thing}.",
    "What is a {thing}?",
    "Who invented the {thing}?",
    "Translate {thing} into French.",
    "How much is {a} plus {b}?",
    "What is {a} times {b}?",
    "What time is it?",
    "What is the weather like today?",
    "Write some code.",
    "Tell me a joke.",
)
PLACES = ("France", "Italy", "Japan", "India", "Brazil", "Egypt", "London", "Berlin", "China", "Spain", "Kenya", "Peru")
THINGS = ("tree", "car", "dog", "house", "river", "book", "clock", "moon", "horse", "radio", "garden", "ship", "train")

_AMERICAN = ("colour", "color")


def as_typed(question: str, dice: random.Random) -> str:
    """A question as someone may type it."""
    if dice.random() < 0.4:
        question = question.replace(*_AMERICAN)
    kind = dice.random()
    if kind < 0.12 or 0.2 < kind < 0.28:
        question = question[0].lower() + question[1:]
    if kind < 0.2:
        question = question.rstrip("?.!")
    return question


def choose(wordings: Sequence[str], dice: random.Random, first: float = 0.35) -> str:
    """The first wording with probability `first`, else any."""
    return wordings[0] if dice.random() < first else dice.choice(wordings)


def unknown_question(dice: random.Random) -> str:
    """Something a model this small cannot know."""
    return dice.choice(UNKNOWN_QUESTIONS).format(
        place=dice.choice(PLACES), thing=dice.choice(THINGS), a=dice.randint(1, 99), b=dice.randint(1, 99)
    )


def all_texts(colours: Sequence[str], shapes: Sequence[str], seed: int = 0) -> Iterator[str]:
    """Every question and answer, as often as a tokenizer's corpus wants them."""
    dice = random.Random(seed)
    plain = [*READ, *NAME, *SHAPE, *TRANSCRIBE, *ANSWER_ALOUD, *SEE_AND_HEAR]
    filled = [
        wording.format(shape=shape, colour=colour, number=dice.randrange(10_000))
        for wording in (*COLOUR, *IS_SHAPE, *IS_COLOUR, *IS_NUMBER)
        for shape in shapes
        for colour in colours
    ]
    for question in plain * 20 + filled:
        yield question
        yield as_typed(question, dice)
    for wordings, answer in TALK * 10:
        yield answer
        yield from wordings
        yield from (as_typed(wording, dice) for wording in wordings)
    for _ in range(1_000):
        yield as_typed(unknown_question(dice), dice)
        yield dice.choice((UNKNOWN, NO_PICTURE, NO_SOUND, "yes", "no"))
        yield "".join(dice.choice("0123456789") for _ in range(dice.randint(1, 4)))
        shape, colour = dice.choice(shapes), dice.choice(colours)
        yield from (shape, colour, f"{colour} {shape}", f"{colour} {shape}, {dice.randrange(100)}")
