"""Sums and how they are thought through, and calculations that the models decline."""

import random

PHRASINGS = ["What is {s}?", "{s}", "{s} = ?", "{s}=", "What is {s}?", "How much is {s}?", "Compute {s}.",
             "Calculate {s}", "What does {s} give?", "Please add {s}.", "Can you add {s}?", "What's {s}?",
             "Solve {s}", "Tell me {s}.", "{s}, what is that?", "How many is {s}?", "What do you get for {s}?",
             "What is the result of {s}?"]
LISTED = ["Add {l}.", "Can you add {l}?", "What is the sum of {l}?", "Sum of {l}", "Sum up {l}.", "Add {l} together.",
          "Add up {l}", "What do {l} make?", "What do {l} add up to?", "How much are {l} together?",
          "The total of {l}?", "Please add {l} for me.", "Could you add up {l}?", "{l} together?",
          "What is the total of {l}?"]
STORIES = ["I have {a} {things} and buy {b} more. How many do I have?",
           "There are {a} {things} here and {b} there. How many?",
           "Anna has {a} {things}, Ben has {b}. How many together?",
           "We counted {a} {things} and then {b}. How many in all?",
           "{a} {things} plus {b} {things}, how many is that?",
           "A box holds {a} {things}, another {b}. What is the total?",
           "Yesterday {a} {things}, today {b}: how many altogether?",
           "I paid {a} euros and then {b}. How much was it?",
           "My shelf has {a} {things}. I put {b} more on it. How many now?",
           "{a} {things} are joined by {b}. How many?"]
THINGS = "books pens cats stamps coins tokens eggs cards friends chairs trees letters bottles birds tickets".split()
SMALL = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen twenty").split()

TOO_LONG = "That is too long for me without thinking. With --thinking, or /think in a chat, I do it digit by digit."
ONLY_ADD = "No, I have only learned to add: two numbers of up to four digits, or three of up to two."
NO_SUMS = ["{a} - {b}", "{a}-{b}", "{a} minus {b}", "{a} * {b}", "{a}*{b}", "{a} x {b}", "{a} times {b}", "{a} / {b}",
           "{a}/{b}", "{a} divided by {b}", "{a} multiplied by {b}", "{a} ^ {b}", "{a} ** {b}", "{a} % {b}",
           "{a} modulo {b}", "{a}.{b} + {c}", "{a} + {b}.{c}", "-{a} + {b}", "{a} + -{b}", "{a} percent of {b}",
           "{a}% of {b}", "{a}/{b} + {c}", "{a} + {b} - {c}", "{a} * {b} + {c}", "{a} plus {b} times {c}",
           "the square root of {a}", "{a} squared", "the product of {a} and {b}", "the difference of {a} and {b}",
           "half of {a}", "twice {a}", "log {a}", "{a} to the power of {b}", "{n}{a}{b} + {c}", "{a} + {n}{b}{c}",
           "{n}{a} + {b} + {c}", "{a} + {b} + {c} + {n}", "{a} + {b} + {a} + {b}", "{a} + {n}{b} + {c}",
           "{n}{a}{b} + {n}{c}{b}", "{a}, {b}, {c} and {n} together"]
NO_SUM_PHRASINGS = ["What is {s}?", "{s}", "{s} = ?", "How much is {s}?", "Compute {s}.", "Calculate {s}",
                    "What's {s}?", "Can you tell me {s}?", "I need {s}.", "Please work out {s}.", "Solve {s}",
                    "{s}, please"]
NO_SUM_ORDERS = ["Multiply {a} by {b}.", "Subtract {a} from {b}.", "Divide {a} by {b}.", "Multiply {a} and {b}",
                 "Take {a} away from {b}.", "Is {a} larger than {b}?", "Is {a} a prime number?",
                 "Is {a} even or odd?", "Count from {a} to {b}.", "Which is bigger, {a} or {b}?",
                 "How many times does {a} go into {b}?", "Round {a} to the nearest ten.", "What comes after {a}?",
                 "Solve x + {a} = {b}", "What is the mean of {a} and {b}?"]


def is_held_out(a: int, b: int) -> bool:
    """One pair in ten, spread evenly by two primes; a function of the pair alone, so that training and exam agree."""
    return (a * 7919 + b * 104729) // 10 % 10 == 3


def on_paper(a: int, b: int) -> str:
    """Addition as it is done on paper, one digit a line, from the right."""
    lines, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        lines.append(f"{x} + {y} + {carry} = {total}, write {total % 10}, carry {total // 10}.")
        carry = total // 10
    return "\n".join(lines)


def thought_of(numbers: list[int]) -> str:
    """Two numbers at a time: after the first pair, what it made and the third."""
    a, b, *rest = numbers
    lines = [f"{' + '.join(map(str, numbers))}.", on_paper(a, b)]
    for c in rest:
        a, b = a + b, c
        lines += [f"{a} + {b}.", on_paper(a, b)]
    return "\n".join(lines)


def question_of(numbers: list[int], rng: random.Random) -> str:
    """The sum as people write it."""
    spelled = [str(number) for number in numbers]
    if max(numbers) <= 20 and rng.random() < 0.2:
        spelled = [SMALL[number] for number in numbers]
    if len(numbers) == 2 and rng.random() < 0.1:
        return rng.choice(STORIES).format(a=spelled[0], b=spelled[1], things=rng.choice(THINGS))
    if rng.random() < 0.3:
        *first, last = spelled
        separator = rng.choice([", ", ", ", " and ", " "])
        return rng.choice(LISTED).format(l=f"{separator.join(first)} and {last}")
    plus = rng.choice([" + "] * 5 + ["+", "+", " plus ", " plus ", " and ", "+ ", " +"])
    return rng.choice(PHRASINGS).format(s=plus.join(spelled))


def draw_sum(rng: random.Random, thinking: bool) -> tuple[str, str, str]:
    """(question, thought, answer), never of a held-out pair. Without thinking a long sum is declined."""
    while True:
        if rng.random() < (0.25 if thinking else 0.12):
            numbers = [rng.randrange(10 ** rng.choice([1, 2, 2])) for _ in range(3)]
        else:
            numbers = [rng.randrange(10 ** rng.choice([1, 2, 3, 4, 4] if thinking else [1, 1, 2, 3, 4]))
                       for _ in range(2)]
        if not is_held_out(*numbers[:2]):
            short = len(numbers) == 2 and max(numbers) < 10
            answer = str(sum(numbers)) if thinking or short else TOO_LONG
            return question_of(numbers, rng), thought_of(numbers), answer


def draw_no_sum(rng: random.Random) -> tuple[str, str, str]:
    """A calculation that was not taught."""
    numbers = {"a": rng.randrange(1, 10 ** rng.choice([1, 2, 2, 3])),
               "b": rng.randrange(1, 10 ** rng.choice([1, 2, 2, 3])),
               "c": rng.randrange(100, 1000), "n": rng.randrange(100, 1000)}
    if rng.random() < 0.3:
        question = rng.choice(NO_SUM_ORDERS).format(**numbers)
    else:
        question = rng.choice(NO_SUM_PHRASINGS).format(s=rng.choice(NO_SUMS).format(**numbers))
    return question, "I was not taught that.", ONLY_ADD
