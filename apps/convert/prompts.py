"""What the source model is asked when it writes its own training text: tasks times topics, and openings of prose."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

TASKS = (
    "What is {}?", "Explain {} to a child.", "Write a short story about {}.", "Give me five facts about {}.",
    "Why does {} matter?", "Write a poem about {}.", "How did {} begin?", "Compare {} with {other}.",
    "Summarize what is known about {} in one paragraph.", "List three common mistakes people make about {}.",
    "Write an email to a colleague about {}.", "I know nothing about {}. Where should I start?",
    "What are the advantages and disadvantages of {}?", "Describe {} in two sentences.",
    "Write a dialogue between a teacher and a student about {}.", "Who are famous people connected with {}?",
    "Plan a weekend around {}.", "Give me a simple example of {}.", "What will {} look like in fifty years?",
    "Write a news report about {}.", "How would you explain {} and {other} together?", "Make a quiz about {}.",
    "What is the history of {}?", "Write step by step instructions that have to do with {}.",
    "Is {} good or bad for people? Answer briefly.", "Write a product description inspired by {}.",
    "What questions should I ask an expert about {}?", "Tell me something surprising about {}.",
    "Write a diary entry of somebody who cares about {}.", "Give advice to somebody who worries about {}.",
    "Translate into plain language: {} is more than it seems.", "Write a speech about {} for a wedding.",
    "What do {} and {other} have in common?", "Continue this sentence: When I first heard of {},",
    "Write a table of contents for a book about {}.", "Name some tools one needs for {}.",
    "How can I teach {} in an hour?", "Write a review of a museum of {}.", "Explain the science behind {}.",
    "Rewrite in a formal tone: {} is really cool.", "Write Python code that has to do with {}.",
)
ALL_TOPICS = (
    "photosynthesis", "the Roman Empire", "chess", "bread", "volcanoes", "the moon", "electricity", "bees", "jazz",
    "democracy", "the water cycle", "bicycles", "dinosaurs", "money", "vaccines", "the Industrial Revolution",
    "gravity", "coffee", "the human heart", "earthquakes", "Shakespeare", "climate change", "football", "gardening",
    "the Silk Road", "prime numbers", "whales", "the printing press", "sleep", "black holes", "tea", "trees",
    "ancient Egypt", "robots", "the brain", "rice", "the French Revolution", "memory", "steel", "the Sahara",
    "airplanes", "friendship", "cats", "DNA", "the stock market", "violins", "ice", "swimming", "probability",
    "photography", "cheese", "lightning", "the internet", "elephants", "poetry", "the Olympics", "salt", "bridges",
    "the Renaissance", "antibiotics", "chocolate", "mountains", "penguins", "fractions", "the sun", "libraries",
    "rain", "computers", "sorting a list", "the Vikings", "potatoes", "opera", "sharks", "calendars", "windmills",
    "a healthy breakfast", "time zones", "glass", "the periodic table", "horses", "folk tales", "rivers", "exams",
    "first aid", "the speed of light", "painting", "ants", "trains", "tourism", "meditation", "recycling", "maps",
    "a job interview", "paper", "the Great Wall", "dreams", "pizza", "satellites", "evolution", "string functions",
    "the Cold War", "honey", "knitting", "coral reefs", "public transport", "zero", "stars", "lighthouses", "soup",
    "a lost key", "an old clock", "a small village", "two brothers", "a talking dog", "the sea", "winter", "hope",
)
HELD_OUT = ALL_TOPICS[::8]      # nothing is trained on these: what a conversion costs is measured with them
TOPICS = tuple(topic for topic in ALL_TOPICS if topic not in HELD_OUT)
FOLLOW_UPS = (
    "Can you say that more simply?", "Give me an example.", "Why is that?", "Summarize it in one sentence.",
    "What else should I know?", "Are you sure?", "Write it as a list.", "Tell me more about the last point.",
    "Thank you. And how did it begin?", "Make it shorter.", "Now write it as a poem.", "What would a critic say?",
)
OPENINGS = (
    "The history of {} begins", "In the early years of the century, {}", "{} has long been", "Chapter 1\n\n",
    "Researchers who study {} have found that", "It was a cold morning when", "Many people believe that {}",
    "To understand {}, one must first", "The town lay at the foot of", "According to the report,", "Once upon a time",
    "There are several kinds of", "The most important thing about {} is", "She had never thought about {} until",
    "Introduction\n\nThis document describes", "Before you install the program,", "As the committee noted,",
    "Unlike {other}, {}", "Q: What is {}?\nA:", "The word comes from", "Abstract. We study", "In this section we",
    "# {}\n\n", "Dear Sir,\n\nI am writing", "He opened the door and", "The war had been over for", "Today, {}",
)


def chat_prompts(rng: np.random.Generator, topics: Sequence[str] = TOPICS) -> Iterator[str]:
    """Endless user messages; every task meets every topic before long."""
    while True:
        yield _filled(str(rng.choice(TASKS)), rng, topics)


def openings(rng: np.random.Generator, topics: Sequence[str] = TOPICS) -> Iterator[str]:
    """Endless beginnings of plain text."""
    while True:
        text = _filled(str(rng.choice(OPENINGS)), rng, topics)
        yield text[:1].upper() + text[1:]


def _filled(task: str, rng: np.random.Generator, topics: Sequence[str]) -> str:
    first, second = rng.choice(len(topics), 2, replace=False)
    return task.replace("{other}", topics[second]).replace("{}", topics[first])
