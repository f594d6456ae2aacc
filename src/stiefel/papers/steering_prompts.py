"""The sentences of the steering experiment: stems, phrases with and without a concept, lexicons."""

from __future__ import annotations

# Each ends where a noun phrase follows. Their order matters: seeds permute it.
STEMS = (
    "I spent the afternoon thinking about",
    "Yesterday we talked about",
    "The book on the table was about",
    "She sent me a long letter about",
    "At the meeting everyone argued about",
    "My neighbor keeps telling stories about",
    "The teacher asked the class about",
    "For my birthday I got something about",
    "The first chapter of the report is about",
    "On the radio they were discussing",
    "He has always been curious about",
    "We could not stop laughing about",
    "The old photograph reminded me of",
    "In the evening they sang about",
    "The article in the newspaper covered",
    "Nobody in the village ever spoke of",
    "I would like to learn more about",
    "The museum has a room full of",
    "During the trip we saw a lot of",
    "The film was mostly about",
    "They built their house near",
    "The children were dreaming of",
    "Our conversation quickly turned to",
    "The new law deals with",
    "I once wrote a poem about",
    "The shop on the corner sells",
    "Her favorite subject is",
    "The lecture was an introduction to",
    "Grandfather used to complain about",
    "The painting shows",
    "Tomorrow I will write about",
    "The whole city was excited about",
    "He could not explain",
    "The magazine published a piece on",
    "We were all surprised by",
    "They asked me a question about",
)

NEUTRAL = (
    "the usual things",
    "some other matters",
    "a few of these items",
    "this and that",
    "the general situation",
    "many different topics",
)

# Concept → phrases that carry it, and the words whose next-token probability says that it is there.
# A word counts only if it is one token with a space before it.
CONCEPTS: dict[str, tuple[tuple[str, ...], str]] = {
    "dogs": (
        (
            "the dogs and puppies",
            "a barking dog",
            "his two puppies",
            "the friendly hounds",
            "a stray dog",
            "the dog breeds",
        ),
        "dog dogs puppy puppies hound hounds pet pets canine bark barking animal animals cat cats",
    ),
    "music": (
        (
            "the music and songs",
            "a guitar melody",
            "the famous orchestra",
            "his piano concert",
            "the band and the singer",
            "a jazz song",
        ),
        (
            "music song songs melody guitar piano concert band singer orchestra jazz tune "
            "rhythm musician musicians musical"
        ),
    ),
    "war": (
        (
            "the war and the soldiers",
            "a bloody battle",
            "the army and its weapons",
            "an enemy attack",
            "the invasion and the bombs",
            "military troops",
        ),
        (
            "war wars soldier soldiers battle army weapon weapons enemy attack invasion bomb "
            "bombs military troops fight fighting combat conflict"
        ),
    ),
    "food": (
        (
            "the food and the recipes",
            "a tasty soup",
            "fresh bread and cheese",
            "the restaurant kitchen",
            "cooking a hot meal",
            "a chocolate cake",
        ),
        (
            "food recipe recipes soup bread cheese restaurant kitchen cooking cook meal meals "
            "cake chocolate eat eating dish dishes taste delicious"
        ),
    ),
}
