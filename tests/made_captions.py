"""Captions such as people write, made at random: the words are plain, the marks between them are not."""

import random

THINGS = """
    dog cat man woman boy girl train bus truck bicycle table bench bridge clock kite surfboard giraffe zebra
    horse pizza sandwich cake banana street kitchen bathroom field beach river mountain building traffic light
    fire hydrant stop sign T-shirt teddy bear cell phone remote TV laptop double-decker SUV RV café
    naïve-looking jalapeño crème-brûlée snowboarder skate-boarder merry-go-round jack-o-lantern x-ray U-turn
    D.J. VW A&W
"""
LOOKS = """
    red blue black-and-white old young large small two-story three-way four-year-old half-eaten well-lit wooden
    multi-colored semi-trailer brightly-colored 1950s '90s-style 10-foot 6-inch 4x4 3-D half-moon un-peeled
    grey/white red/white/blue light-blue polka-dot 18th-century mid-air close-up ready-to-eat state-of-the-art
"""
DOES = """
    sits stands is isn't sitting riding holding doesn't hold can't reach couldn't see won't eat has hasn't eaten
    they're watching who's near that's on it's by he'd like she'll take we've seen I'm at there's wouldn't've
    let's cannot gonna wanna gotta ain't y'all o'clock don’t it’s who’s goin' 'em 'til rock'n'roll lookin' at
"""
PLACES = [
    "on a table", "in front of St. Paul's", "at 5 p.m.", "at 12:30 pm", "on Main St.", "on 5th Ave.",
    "near Mt. Rainier", "in the U.S.", "in Washington, D.C.", "at the O.K. corral", "in L.A.",
    "with Mr. and Mrs. Smith", "at Dr. Who's", "for $5", "for $1,000.50", "at 50% off", "for 99¢", "for €5",
    "for £10", "weighing 12.5 lbs.", "of 3 ft. 2 in.", "about 5'10\" tall", "about 6 ft tall", "5\" x 7\"",
    "no. 7", "No. 12", "#1", "# 4", "the #5 train", "24/7", "and/or a cat", "w/ a cat", "w/o a cat",
    "vs. a cat", "etc.", "e.g. a cat", "i.e., a cat", "(left)", "(a cat)", "[sic]", "in 1/2 of 3/4",
    "1 1/2 miles", "2-1/2 cups", "½ full", "1½ full", "at 70°F", "at 30 °C", "over 1,000 ft.", "1st", "the 2nd",
    "21st", "in the '60s", "in the 1970's", "in 2010-11", "on 11/12/2010", "on Sept. 11", "Jan. 1st", "on Mon.",
    "at www.flickr.com", "from http://example.com/a_b", "at example.org", "by me@example.com", "@somebody",
    "#hashtag", "AT&T", "Q&A", "R & B", "rock & roll", "salt&pepper", "Ben & Jerry's", "M&M's", "McDonald's",
    "Levi's", "7-Eleven", "Boeing 747-400", "Flight 815", "Route 66", "I-95", "A-10", "F/A-18", "f/2.8", "50mm",
    "1080p", "10 a.m.-5 p.m.", "c. 1900", "J. K. Rowling", "J.R.R. Tolkien", "George W. Bush",
    "Martin Luther King Jr.", "Acme Inc.", "Ford Motor Co.", "Smith & Co.", "Sgt. Pepper", "Gen. Lee",
    "Ph.D. student", "B.C.", "A.D. 79", "U.S. Airways", "U.S.S. Enterprise", "cont'd", "ma'am", "O'Hare",
    "L'Oreal", "D'Angelo", "dogs' bowls", "James' hat", "boss's hat", "the girls’ bags", ":)", ";-)", ":D",
    "=)", "<3", "***", "!!", "?!", "-->", "~", "|", "\\", "a@b", "5+5", "A+", "C++", "x=5", "*star*",
    "“quoted”", "‘single’", "\"quoted\"", "'single'", "``old''", "– that is", "— well", "--oh--", "…", "...",
    "....", ". . .", "™", "©2010", "®", "•", "×", "é", "ñandú", "Zürich", "東京", "Москва", "🐶", "❤️", "→", "5–6",
    "½", "m²", "No.", "a.m", "St",
]  # fmt: skip
ENDS = [
    "", "", "", ".", ".", ".", ". ", " .", "!", "?", "..", "...", "!!", ",", ";", " -", ".)", ".\"", "\".",
    "!'", "etc.", ".",
]  # fmt: skip
JOINS = [
    " ", " ", " ", " ", " ", " ", ", ", " , ", ",", "; ", ": ", " - ", "-", "--", " -- ", "/", " / ", ". ", ".",
    "  ", " & ",
]  # fmt: skip


def captions(count, seed=0):
    """Return captions; half of them plain, the others with whatever people put into captions."""
    return [_caption(random.Random(f"{seed} {i}"), plain=i % 2 == 0) for i in range(count)]


def _caption(rng, plain):
    words = [rng.choice(["A", "a", "The", "the", "Two", "An", "Some", "There's a", '"A', "(A"][: 6 if plain else 10])]
    for _ in range(rng.randint(1, 3)):
        words += [
            rng.choice(LOOKS.split()),
            rng.choice(THINGS.split()),
            rng.choice(DOES.split()),
            rng.choice(PLACES if rng.random() < 0.7 else THINGS.split()),
        ]
    joins = [" " if plain and rng.random() < 0.9 else rng.choice(JOINS) for _ in words]
    text = "".join(word + join for word, join in zip(words, joins, strict=True)).strip() + rng.choice(ENDS)
    case = rng.random()
    return text.upper() if case < 0.03 else text.title() if case < 0.06 else text
