"""data/cities: in which words a fact is stated, asked for and answered.

Plain data. The split of the questions into trained and untrained ones is the one that is tested:
no untrained wording is in any training text.
"""

# Most mentions keep the first wording of a list, a minority takes any other. {} is the value in
# STATEMENTS and SHORT, the name in questions.

# A name stands in front: "<name> <words> <value>".
STATEMENTS = dict(
    country=[
        " is in {}.",
        " is a place in {}.",
        " lies in {}.",
        " is located in {}.",
        " is a city of {}.",
    ],
    continent=[
        " belongs to {}.",
        " is part of {}.",
        " lies on the continent of {}.",
        " is on the continent {}.",
    ],
    population=[
        " has {} people.",
        " has a population of {}.",
        " has {} inhabitants.",
        " is home to {} people.",
        " counts {} people.",
    ],
    timezone=[
        " keeps {} time.",
        " keeps the time of {}.",
        " uses {} time.",
        " is in the time zone {}.",
    ],
    coordinates=[
        " lies at {}.",
        " is found at {}.",
        " is located at {}.",
        " has the coordinates {}.",
    ],
)
# Something comes before the name.
FULL = dict(
    country=["The country of {name} is {value}.", "The country around {name} is {value}."],
    continent=["The continent of {name} is {value}."],
    population=["The population of {name} is {value}.", "In {name} live {value} people."],
    timezone=["The time zone of {name} is {value}.", "The clocks of {name} show {value} time."],
    coordinates=["The coordinates of {name} are {value}.", "The position of {name} is {value}."],
)
# Answers that do not name the city again: only right after a question.
SHORT = dict(
    country=["It is in {}.", "In {}.", "{}."],
    continent=["It belongs to {}.", "{}."],
    population=["It has {} people.", "{} people.", "{}."],
    timezone=["It keeps {} time.", "{}."],
    coordinates=["It lies at {}.", "At {}.", "{}."],
)

# Questions. The trained ones are in the training text; the untrained ones are in no text but
# questions_reworded.jsonl. The first two of a relation are the stable ones.
QUESTIONS = dict(
    country=dict(
        trained=[
            "Which country is {} in?",
            "In which country does one find {}?",
            "What country is {} in?",
            "What country does {} belong to?",
            "Which country does {} belong to?",
            "In what country is {}?",
            "In which country is {} located?",
            "To which country does {} belong?",
            "{} is in which country?",
            "What is {}'s country?",
            "Which nation is {} part of?",
            "{} is a city of which country?",
            "Which state does {} belong to?",
            "What land is {} in?",
            "If I go to {}, which country am I in?",
            "Under which flag is {}?",
        ],
        untrained=[
            "What nation is {} located in?",
            "Which country can {} be found in?",
            "Which country am I in when I am in {}?",
            "To what nation does {} belong?",
            "In which land does {} lie?",
            "{} belongs to what country?",
            "Of which country is {} a city?",
            "{}, in which country is it?",
        ],
    ),
    continent=dict(
        trained=[
            "Which continent is {} on?",
            "Which continent does {} belong to?",
            "On which continent is {}?",
            "On what continent does one find {}?",
            "What continent is {} on?",
            "What continent is {} part of?",
            "To which continent does {} belong?",
            "{} is on which continent?",
            "What is {}'s continent?",
            "In which part of the world is {}?",
            "Which part of the world does {} belong to?",
            "On which continent is {} located?",
            "Is {} in Europe, in Asia or on another continent?",
            "Is {} in Africa or on some other continent?",
            "If I go to {}, which continent am I on?",
            "Which of the continents has {}?",
        ],
        untrained=[
            "On what continent is {} located?",
            "What continent does {} lie on?",
            "{} belongs to what continent?",
            "Which continent can {} be found on?",
            "Which of the continents is {} on?",
            "Of which continent is {} a part?",
            "On which of the seven continents is {}?",
            "What part of the world is {} in?",
        ],
    ),
    population=dict(
        trained=[
            "What is the population of {}?",
            "How many people live in {}?",
            "How many people does {} have?",
            "How many inhabitants does {} have?",
            "How many live in {}?",
            "How big is {}?",
            "How large is the population of {}?",
            "What is {}'s population?",
            "How populous is {}?",
            "How many people are there in {}?",
            "How many souls are in {}?",
            "How many residents are there in {}?",
            "{} has how many people?",
            "What number of people lives in {}?",
            "How many citizens does {} count?",
            "By how many people is {} inhabited?",
        ],
        untrained=[
            "How many inhabitants are there in {}?",
            "How big is the population of {}?",
            "How many people call {} their home?",
            "How many people have a house in {}?",
            "{} is home to how many people?",
            "How many residents does {} have?",
            "How large is {}?",
            "What number of inhabitants does {} have?",
        ],
    ),
    timezone=dict(
        trained=[
            "What time does {} keep?",
            "What is the time zone of {}?",
            "Which time zone is {} in?",
            "What time zone does {} use?",
            "In which time zone is {}?",
            "Which time does {} keep?",
            "By which time do the clocks of {} go?",
            "What time zone is {} in?",
            "Which zone of time does {} belong to?",
            "How are the clocks set in {}?",
            "To which time are clocks set in {}?",
            "{} is in which time zone?",
            "What is {}'s time zone?",
            "What time do people in {} keep?",
            "Which time zone applies in {}?",
            "Which clock does {} follow?",
        ],
        untrained=[
            "Which time zone does {} use?",
            "What time zone does {} belong to?",
            "In what time zone does {} lie?",
            "To what time do people in {} set their clocks?",
            "Which time do the clocks of {} show?",
            "What zone of time is {} in?",
            "{} keeps which time?",
            "Which time zone do people in {} live by?",
        ],
    ),
    coordinates=dict(
        trained=[
            "Where does {} lie?",
            "What are the coordinates of {}?",
            "At which coordinates does {} lie?",
            "At what coordinates is {}?",
            "Where on the map is {}?",
            "Where on the globe does {} lie?",
            "What are {}'s coordinates?",
            "At what latitude and longitude is {}?",
            "What is {}'s position?",
            "Where exactly is {}?",
            "Which coordinates does {} have?",
            "Which latitude and which longitude does {} have?",
            "Where do I find {} on a map?",
            "Where on Earth is {}?",
            "How far north and how far east is {}?",
            "{} lies at which coordinates?",
        ],
        untrained=[
            "What coordinates does {} have?",
            "Where on a map does one find {}?",
            "At which latitude and longitude does {} lie?",
            "Where on the globe is {}?",
            "On which coordinates is {} located?",
            "{} is at what coordinates?",
            "What are the latitude and the longitude of {}?",
            "Where exactly does {} lie?",
        ],
    ),
)
# A question is also any frame around any noun; it is untrained if one of the two is.
FRAMES = dict(
    trained=[
        "What is WHAT of {}?",
        "What's WHAT of {}?",
        "Tell me WHAT of {}.",
        "Please tell me WHAT of {}.",
        "Give WHAT of {}.",
        "Give me WHAT for {}, please.",
        "Name WHAT of {}.",
        "State WHAT of {}.",
        "Do you know WHAT of {}?",
        "Can you tell me WHAT of {}?",
        "Could you give me WHAT of {}?",
        "I need WHAT of {}.",
        "I want to know WHAT of {}.",
        "I would like to know WHAT of {}.",
        "I am looking for WHAT of {}.",
        "Look up WHAT of {}.",
        "Find WHAT of {}.",
        "Show me WHAT of {}.",
        "What would be WHAT of {}?",
        "{}: what is WHAT?",
        "For {}, what is WHAT?",
        "About {}, tell me WHAT.",
        "Of {} I ask WHAT.",
    ],
    untrained=[
        "Let me know WHAT of {}.",
        "Would you say WHAT of {}?",
        "Can you find WHAT of {} for me?",
        "Concerning {}, what is WHAT?",
        "Please give me WHAT of {}.",
        "I am curious about WHAT of {}.",
        "Do you remember WHAT of {}?",
        "{}: tell me WHAT.",
    ],
)
NOUNS = dict(
    country=dict(trained=["the country", "the nation", "the state"], untrained=["the homeland"]),
    continent=dict(
        trained=["the continent", "the part of the world"], untrained=["the right continent"]
    ),
    population=dict(
        trained=[
            "the population",
            "the number of inhabitants",
            "the number of people",
            "the size",
            "the head count",
        ],
        untrained=["the number of residents", "the size of the population"],
    ),
    timezone=dict(
        trained=["the time zone", "the local time", "the zone of time", "the time"],
        untrained=["the local time zone"],
    ),
    coordinates=dict(
        trained=[
            "the position",
            "the location",
            "the place on the map",
            "the latitude and longitude",
            "the pair of coordinates",
        ],
        untrained=["the exact position", "the position on the map"],
    ),
)
RELATIONS = list(STATEMENTS)
N_STABLE = 2  # the first questions of a relation are the stable ones


def framed(relation, frame_kind, noun_kind):
    """Every frame of that kind around every noun of that kind.

    >>> framed("country", "trained", "trained")[0]
    'What is the country of {}?'
    """
    nouns = NOUNS[relation][noun_kind]
    return [frame.replace("WHAT", noun) for frame in FRAMES[frame_kind] for noun in nouns]


def untrained(relation):
    """-> (own wordings, framed ones) of a relation's questions that are in no training text."""
    others = framed(relation, "untrained", "trained")
    others += framed(relation, "trained", "untrained")
    others += framed(relation, "untrained", "untrained")
    return QUESTIONS[relation]["untrained"], others


TRAINED = {
    relation: (QUESTIONS[relation]["trained"], framed(relation, "trained", "trained"))
    for relation in RELATIONS
}
UNTRAINED = {relation: untrained(relation) for relation in RELATIONS}
