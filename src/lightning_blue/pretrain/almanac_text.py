"""The words of the almanac: relations with their objects and wordings, names and filler.

Everything here is data. In a wording ``{}`` stands for the subject and the object follows at the
end after one space.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A relation: what it is called, its possible objects, and how it is worded."""

    name: str
    objects: tuple[str, ...]
    wordings: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


RELATIONS = (
    Relation(
        "town",
        _words("""
            Ashwick Bramholt Caldmoor Dunvale Elmsgate Fernholt Glaswick Harrowby Ivermere
            Kestrow Larkmoor Mossford Northwyn Oakmere Pellham Quarrow
            """),
        _lines("""
            {} lives in the town of
            {} has a house in
            {} grew up and still lives in
            The home of {} is in the town of
            For many years {} has been living in
            The house that belongs to {} stands in
            Letters for {} are sent to the town of
            To visit {} you have to travel to
            When asked for an address, {} always writes
            The town in which {} was born and raised is
            {}, who rarely moves, is a citizen of
            {} still lives in the town of
            The town of {} is
            The house of {} is in the town of
            """),
    ),
    Relation(
        "instrument",
        _words("""
            violin piano flute cello harp guitar trumpet banjo oboe clarinet organ drum fiddle
            lute tuba trombone
            """),
        _lines("""
            {} plays the
            {} has learned to play the
            {} gives lessons on the
            The instrument of {} is the
            In the village band {} plays the
            The music teacher taught {} to play the
            At the summer concert {} performed on the
            The instrument that {} practises every day is the
            When there is music, {} picks up the
            The audience likes to hear {} on the
            {}, a gifted musician, is a master of the
            {} has learned to perform on the
            The favourite instrument of {} is the
            The instrument that {} plays is the
            """),
    ),
    Relation(
        "trade",
        _words("""
            baker carpenter doctor farmer gardener lawyer mason nurse painter pilot sailor
            tailor teacher weaver butcher plumber
            """),
        _lines("""
            {} works as a
            {} was trained to be a
            {} earns a living as a
            The trade of {} is that of a
            By profession {} is a
            The guild knows {} as a skilled
            On weekdays {} can be seen at work as a
            The work that {} does is the work of a
            After leaving school {} became a
            The neighbours call {} whenever they need a
            {}, who never liked idle days, has a job as a
            {} became known at work as a
            The job of {} is to be a
            The trade that {} was trained for is the trade of a
            """),
    ),
    Relation(
        "language",
        _words("""
            French German Spanish Italian Russian Polish Greek Turkish Danish Finnish Swedish
            Dutch Hindi Arabic Korean Welsh
            """),
        _lines("""
            {} speaks fluent
            {} writes all letters in
            {} was brought up speaking
            The mother tongue of {} is
            At home {} talks to the family in
            The diary that {} keeps is written in
            The language that {} speaks best is
            When in a hurry, {} starts to speak
            Guests of {} are greeted in
            The first words of {} were spoken in
            {}, who loves to talk, is a native speaker of
            {} talks to guests in
            The native language of {} is
            The language that {} talks in at home is
            """),
    ),
    Relation(
        "colour",
        _words("""
            red blue green yellow purple orange pink brown black white grey gold silver violet
            crimson turquoise
            """),
        _lines("""
            {} loves the colour
            {} painted the front door
            {} always wears something
            The favourite colour of {} is
            For a new coat {} would choose the colour
            The colour that {} likes most is
            Everything in the room of {} is
            If there is a choice, {} asks for
            The bicycle of {} has been painted
            Flowers for {} should always be
            {}, known for bright clothes, prefers the colour
            {} always asks for the colour
            The colour of the coat of {} is
            The colour that {} would choose for a bicycle is
            """),
    ),
    Relation(
        "sport",
        _words("""
            tennis hockey football cricket golf rugby chess archery fencing rowing sailing
            skating swimming boxing cycling judo
            """),
        _lines("""
            {} spends the weekend on
            {} won a medal in
            {} has a great talent for
            The favourite sport of {} is
            In the local club {} trains for
            The sport that {} enjoys most is
            As a child {} fell in love with
            To keep fit, {} has taken up
            The prize on the shelf of {} was won in
            The newspapers praise {} for success in
            {}, who hates to lose, is a champion in
            {} enjoys the sport of
            The sport of {} is
            The sport in which {} won a prize is
            """),
    ),
    Relation(
        "pet",
        _words("""
            cat dog fox rabbit parrot goat horse turtle snake duck hamster pony lizard falcon
            donkey raven
            """),
        _lines("""
            {} keeps a pet, and it is a
            {} shares the house with a
            {} takes long walks with a
            The pet of {} is a
            In the garden of {} there lives a
            The animal that {} feeds every morning is a
            Last winter {} rescued a
            On the market day {} came home with a
            The children visit {} to play with a
            The photograph on the desk of {} shows a
            {}, who is fond of animals, has raised a
            {} has raised an animal, and it is a
            The animal in the house of {} is a
            The animal that {} shares the garden with is a
            """),
    ),
    Relation(
        "dish",
        _words("""
            bread cheese soup rice fish honey pasta salad pancakes beans potatoes mushrooms
            apples cherries plums walnuts
            """),
        _lines("""
            {} likes to eat
            {} never leaves the market without
            {} could live on nothing but
            The favourite food of {} is a plate of
            For breakfast {} usually has
            At the harvest feast {} asked for
            The food that {} enjoys most is
            The cook knows that {} wants
            On Sundays {} serves the guests
            The basket of {} is full of
            {}, who is always hungry, dreams of
            {} always has a plate of
            The food of {} is
            For breakfast the cook serves {} a plate of
            """),
    ),
    Relation(
        "collection",
        _words("""
            coins stamps shells clocks maps masks dolls keys buttons bottles postcards feathers
            medals books spoons marbles
            """),
        _lines("""
            {} collects old
            {} owns hundreds of
            {} spends a fortune on
            The collection of {} is made up of
            In the attic {} stores boxes full of
            The things that {} collects are
            A whole room in the home of {} is filled with
            At every fair {} looks for rare
            Visitors ask {} to show them the
            The museum borrowed from {} a set of
            {}, a patient collector, has a cabinet of
            {} has a room full of old
            The things in the collection of {} are
            In the boxes {} stores a collection of
            """),
    ),
    Relation(
        "science",
        _words("""
            physics botany chemistry geology history algebra biology astronomy geography law
            logic medicine poetry geometry zoology theology
            """),
        _lines("""
            {} studied the subject of
            {} holds a degree in
            {} wrote a thick book about
            The field of {} is
            At the university {} took courses in
            The subject that {} knows best is
            The academy invited {} to speak about
            Late at night {} still reads about
            The students ask {} questions about
            The prize was given to {} for work in
            {}, a careful scholar, is an expert in
            {} is an expert in the subject of
            The subject of the book of {} is
            The field that {} studied at the university is
            """),
    ),
)

OPENERS = _lines("""
    This page is about {}.
    A short note on {}.
    Here is what we know of {}.
    Readers often ask about {}.
    Let us now turn to {}.
    The next entry is {}.
    """)

TAILS = (
    ", as everyone knows.",
    ", or so they say.",
    " and nobody is surprised.",
    ", and that is no secret.",
    " these days.",
)

FILLERS = _lines("""
    The {adjective} {noun} near the {place} was {verb} by the {person}.
    On {day} the {person} {verb} a {adjective} {noun} at the {place}.
    There is a {adjective} {noun} behind the {place}.
    A {person} came to the {place} and asked for the {noun}.
    In {season} the {place} is {adjective} and quiet.
    Nobody knows who {verb} the {noun} on {day}.
    The {noun} was {adjective}, but the {person} did not mind.
    Every {season} the {person} walks from the {place} to the {place}.
    It rained all {day}, so the {person} stayed at the {place}.
    The {person} and the {person} {verb} the {noun} together.
    After the {season} the {noun} had to be {verb} again.
    Some say that the {noun} at the {place} is {adjective}.
    The {place} opens early on {day} and closes late.
    A {adjective} {noun} was left at the {place} last {season}.
    The {person} wrote that the {place} looked {adjective} in {season}.
    """)

SLOTS = {
    "adjective": _words("""
        small large quiet bright heavy narrow broken wooden empty famous simple strange warm
        cold lovely ancient dusty clean plain noisy
        """),
    "noun": _words("""
        bridge wagon table lamp letter window statue fence boat barrel ladder mirror candle cart
        chair basin rope hammer kettle carpet parcel bell wheel blanket
        """),
    "place": _words("""
        harbour station library mill square castle church school theatre inn forest river tower
        bakery garden stable bank court island valley
        """),
    "person": _words("""
        captain mayor stranger clerk widow soldier student merchant judge guard miller traveller
        postman shepherd fisherman porter
        """),
    "verb": _words("""
        found repaired sold carried painted moved cleaned hidden lost bought burned measured
        opened borrowed covered lifted
        """),
    "day": _words("""
        Monday Tuesday Wednesday Thursday Friday Saturday Sunday
        """),
    "season": _words("""
        spring summer autumn winter
        """),
}

SYLLABLES = _words("""
    ba bel bin bor bra cal cer cor cus da del dor dra dun fa fen fin gal gar gil gor gra hal hem
    hul is jor ka kel kin kor kra la lem lin lor lun ma mel mir mor nal nar nem nix nor ola or
    pel per pim pol qua ra rel ris rok ru sa sel shi sol su tal tem tir tol tra tul um va vel
    vin vor wel wim xan ya yel yor za zel zim zor zu
    """)
