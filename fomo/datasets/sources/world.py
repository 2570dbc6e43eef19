"""The rendered world: a small image-text benchmark that is drawn, not downloaded.

    render("digits", "three", 7)          a 32 x 32 picture, the same one in every process
    caption("digits", "three", 7)         "a drawing of the red digit three."
    caption("scenes", "house", 7)         "look: the house left of the key."
    World("flags", split="test", per_concept=50)                      one dataset of ten concepts
    World("base", split="train", per_concept=300, style="mixed")      the pretraining pool

A domain is a dataset: a table of concepts and a function that draws them. Base domains are what a model is
pretrained on, adaptation domains what it learns later; the combination domain joins words that base captions
hold but never join ("red" and "circle"). Scenes hold two figures, for retrieval: their captions say more than a
class. A style (sketched, noisy, ...) changes how any domain looks.

Everything random about a picture comes from one generator, seeded by (seed, split, domain, style, concept,
index). It first draws the look (colours, position, size, tilt, ...), which the caption may then mention.

Read in order: colours, tables of glyphs and fields, Pen, draw functions, DOMAINS, styles, render, World.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal
from zlib import crc32

import numpy as np
import PIL
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from fomo.datasets.sources.base import Source
from fomo.errors import FieldError
from fomo.schema import Count, Range, Share, one_of

VERSION = 3  # raise it whenever a pixel or a caption changes

# fmt: off
COLOURS = {
    "red": (214, 40, 40), "orange": (245, 135, 30), "yellow": (250, 220, 60), "green": (40, 150, 60),
    "cyan": (90, 210, 225), "blue": (40, 70, 200), "purple": (125, 45, 160), "pink": (250, 150, 190),
    "brown": (120, 75, 35), "gray": (135, 135, 135), "white": (245, 245, 245), "black": (20, 20, 20),
}
BRIGHTNESS = {name: float(np.dot(rgb, (0.30, 0.59, 0.11))) for name, rgb in COLOURS.items()}  # 0 to 255

# (dark, light): the pairs that tell figure from ground even in a gray picture.
PAIRS = [(a, b) for a in COLOURS for b in COLOURS if BRIGHTNESS[b] - BRIGHTNESS[a] > 70]

# A glyph is a line of commands, each `[colour]tool[numbers]`. Numbers are points "xy" of a 9 x 9 grid: 00 is
# top left, 44 the centre, 88 bottom right. Tools:
#     -  straight line    ~  smooth line        #  polygon    @  smooth outline, filled
#     o  ring             .  disc: "xyr", the radius r in half steps of the grid    =  flood the canvas
# The colour is one of these letters, _ for the ground, none for the colour of the figure.
LETTERS_OF_COLOURS = dict(zip("ROYGCBPMNSWK", COLOURS, strict=True))

SHAPES = {
    "circle": ".448", "ring": "o446 o447", "square": "#11717717", "triangle": "#408707",
    "diamond": "#40744814", "cross": "#305053838555583835050333", "crescent": ".448 _.647",
    "oval": "@0322628385662605", "semicircle": "#061331517386", "pentagon": "#4083682803",
}
DIGITS = {
    "zero": "~40222648666240", "one": "-224048 -2868", "two": "~1240724518 -1878",
    "three": "~11407244 ~44764817", "four": "-58501575", "five": "-701014 ~1443764817",
    "six": "~60321548764416", "seven": "-107038", "eight": "~4022446240 ~4416487644",
    "nine": "~7240124472 ~726638",
}
LETTERS = {
    "A": "-184078 -2565", "B": "-1018 ~1040624414 ~1444764818", "C": "~714012164877",
    "D": "-1018 ~104073754818", "E": "-70101878 -1464", "F": "-701018 -1464", "G": "~714012164876 -787444",
    "H": "-1018 -7078 -1474", "I": "-4048 -2060 -2868", "J": "-3070 ~5053563816", "K": "-1018 -701478",
    "L": "-101878", "M": "-1810447078", "N": "-18107870", "O": "~40121648767240", "P": "-1810 ~1050725414",
    "Q": "~40121648767240 -5588", "R": "-1810 ~1050725414 -4478", "S": "~71401244764817", "T": "-1070 -4048",
}
FACES = {
    "happy": "_.232 _.632 _~25365665", "sad": "_.232 _.632 _~27365667", "angry": "_-1233 _-7253 _-2666",
    "surprised": "_.232 _.632 _.463", "sleeping": "_-1333 _-5373 _.461",
    "winking": "_.232 _-5373 _~25365665", "bored": "_.232 _.632 _-2666",
    "laughing": "_-132233 _-536273 _#256547", "crying": "_-2225 _-6265 _-374657",
    "dizzy": "_-1234 _-1432 _-5274 _-5472 _-3656",
}
ICONS = {
    "house": "#408404 #13737818 _#35555838", "tree": ".244 .644 .425 #35555838",
    "car": "#0424325264848606 .263 .663 _.261 _.661", "boat": "#05856828 #407444 #311434",
    "fish": "@04326436 #548286 _.241", "cup": "#12625828 ~63838556", "key": "o243 -4484 -6466 -8486",
    "flower": ".413 .233 .633 .343 .543 _.432 -4548 -4866", "umbrella": "#041230507284 ~44473827",
    "cat": ".456 #101542 #707546 _.341 _.541",
}
PLACES = {  # 0 and 8 lie beyond the edge of the picture
    "beach": "C= B#04848808 Y#06858808 O.613", "forest": "C= N#06868808 G#211636 G#413656 G#615676",
    "mountain": "C= G#07878808 S#173157 S#375277 W#31433223",
    "city": "K= S#14343818 P#41616848 S#65757868 Y.251 Y.271 Y.531 Y.551 Y.571",
    "desert": "O= Y#05848808 G-4247 G-232545 G-446462",
    "ocean": "B= W~021322334253627382 W~051625364556657685",
    "island": "B= Y@16457647 N~463542 G~234252 G~314263", "road": "C= G#04848808 S#34547818 W-4546 W-4748",
    "sunset": "P= O.446 K#05858808 O-3656", "volcano": "S= N#08335388 R#33534746 W.423 W.514",
}
SYMBOLS = {
    "heart": "#4804022042608284", "spiral": "~44553624427376481704", "infinity": "~442204264462846644",
    "hash": "-3028 -6058 -1373 -0565", "percent": ".222 .662 -7117", "bolt": "#501545387343",
    "music note": ".272 -373063", "peace": "o448 -4048 -4417 -4477", "omega": "-1838 ~3814407458 -5878",
    "question mark": "~1240724446 .481",
}
FLAGS = {
    "Veldora": "R#01818303 W#03838505 K#05858707", "Kestria": "W#01818303 R#03838505 W#05858707",
    "Marundi": "B#01313707 W#31515737 R#51818757", "Zubella": "Y#01818707 R.444",
    "Orlanda": "B#01818707 W-3137 W-0484", "Tavinia": "R#018107 K#818707", "Quorra": "G#01818707 Y#014407",
    "Belmark": "W#01414404 B#41818444 B#04444707 W#44848747", "Sundvik": "W#01818707 R-0187 R-0781",
    "Drovia": "K#01818707 Y.445 K.544",
}
OBJECTS = {
    "bell": "#17252341636577 .482", "bicycle": "o264 o664 -26346446 -4626 -666353",
    "crown": "#01244164817717", "guitar": ".265 .443 -4480 _.261", "hammer": "#10606313 #33434838",
    "ladder": "-2028 -6068 -2161 -2363 -2565 -2767", "mushroom": "@041140718454 #34545838 _.321 _.531",
    "rocket": "#4063662623 #250828 #658868 _.431", "scissors": "o272 o672 -3660 -5620",
    "glasses": "o243 o643 -3454",
}
ROOMS = {
    "bedroom": "#11515717 _#22424323 -7173", "bathroom": "@1131373717 o654 .651",
    "kitchen": "#11717313 _.221 _.321 _.521 _.621 #14343717", "office": "#12525424 .363 -7177",
    "dining room": ".443 .222 .622 .262 .662", "lounge": "#11313515 #11717313 .552",
    "corridor": "#01313707 #51818757", "staircase": "-1171 -1272 -1373 -1474 -1575 -1676 -1777",
    "library": "#11212717 #31414737 #51616757", "garage": "#12727616 .212 .612 .272 .672 _-5355",
}
SIGNS = {
    "stop": "R#2060828668280602 W-1474", "no entry": "R.448 W#13737515", "yield": "R#018148 W#226245",
    "priority": "W#40844804 Y#41744714", "parking": "B#00808808 W-3236 W~3262646434",
    "warning": "Y#408707 K-4245 K.461", "one way": "K#02828606 W-1464 W-536455",
    "speed limit": "W.448 Ro447 K-523234 K~3454655636", "dead end": "B#00808808 W-4447 R-2262",
    "crossing": "W#40844804 K-4147 K-1474",
}
CLOCKS = {  # hour, minute
    "noon": (12, 0), "two o'clock": (2, 0), "four o'clock": (4, 0), "six o'clock": (6, 0),
    "eight o'clock": (8, 0), "half past one": (1, 30), "half past ten": (10, 30),
    "quarter past five": (5, 15), "quarter to three": (2, 45), "quarter to eight": (7, 45),
}
BARS = {  # heights, in steps of the grid
    "growth": "12468", "decline": "86421", "valley": "73137", "peak": "14741", "plateau": "66666",
    "alternation": "82828", "early spike": "28222", "late spike": "22282", "step up": "222777",
    "step down": "777222",
}
STARS = {  # number of points, radius of the inner corners, a glyph on top
    "three-pointed star": (3, 0.25, ""), "four-pointed star": (4, 0.45, ""), "sparkle": (4, 0.15, ""),
    "five-pointed star": (5, 0.42, ""), "six-pointed star": (6, 0.55, ""), "starburst": (14, 0.75, ""),
    "eight-pointed star": (8, 0.6, ""), "hollow star": (5, 0.5, "_.442"), "ringed star": (5, 0.42, "o448"),
    "shooting star": (5, 0.42, "-4408"),
}
# fmt: on


def stripes(t):
    """True and false in turn, three and a half times each from t = -1 to 1."""
    return np.sin(11 * t) > 0


def angle(x, y):
    """0 to 1 once around the centre."""
    return np.arctan2(y, x) / (2 * math.pi) + 0.5


# A field gives for x and y in [-1, 1] (arrays of one shape) how much of the second colour is there, 0 to 1.
TEXTURES = {
    "horizontal stripes": lambda x, y: stripes(y),
    "vertical stripes": lambda x, y: stripes(x),
    "diagonal stripes": lambda x, y: stripes((x + y) / 1.4),
    "checks": lambda x, y: stripes(x) ^ stripes(y),
    "polka dots": lambda x, y: np.cos(11 * x) + np.cos(11 * y) > 0.8,
    "grid": lambda x, y: np.maximum(np.cos(11 * x), np.cos(11 * y)) > 0.75,
    "waves": lambda x, y: stripes(y + 0.16 * np.sin(7 * x)),
    "bricks": lambda x, y: np.maximum(np.cos(11 * y), np.cos(8 * x + math.pi * stripes(y / 2))) < 0.8,
    "target rings": lambda x, y: stripes(np.hypot(x, y)),
    "rays": lambda x, y: stripes(4 * angle(x, y)),
}
GRADIENTS = {
    "fade right": lambda x, y: (1 + x) / 2,
    "fade left": lambda x, y: (1 - x) / 2,
    "fade down": lambda x, y: (1 + y) / 2,
    "fade up": lambda x, y: (1 - y) / 2,
    "corner": lambda x, y: (2 - x - y) / 4,
    "glow": lambda x, y: 1.1 - np.hypot(x, y),
    "vignette": lambda x, y: np.hypot(x, y),
    "horizon": lambda x, y: 1 - abs(y),
    "pillar": lambda x, y: 1 - abs(x),
    "sweep": angle,
}


@dataclass(frozen=True)
class Look:
    """What varies between pictures of one concept, apart from what the draw functions add."""

    style: str  # a key of FILTERS
    ink: str  # colour of the figure
    ground: str
    size: float  # of the figure, about 1
    tilt: float  # degrees
    x: float  # of the centre, in halves of the picture from its middle
    y: float
    stretch: float  # width over height
    weight: float  # of lines, in halves of the figure
    other: float  # 0 to 1: which other figure a scene holds, and where


def draw_look(rng: np.random.Generator, style: str) -> Look:
    """Dark on light three times of four: inverted pictures are then unusual, not unheard of."""
    dark, light = PAIRS[rng.integers(len(PAIRS))]
    ink, ground = (dark, light) if rng.random() < 0.75 else (light, dark)
    ranges = [(0.8, 1.15), (-12, 12), (-0.15, 0.15), (-0.15, 0.15), (0.85, 1.15), (0.18, 0.28), (0, 1)]
    return Look(style, ink, ground, *rng.uniform(*np.transpose(ranges)).tolist())


class Pen:
    """Draws in the figure's own units: it fills -1 to 1 both ways, x to the right, y down."""

    def __init__(self, look: Look, rng: np.random.Generator, zoom: float, pixels: int):
        self.rng, self.look, self.ink, self.ground = rng, look, look.ink, look.ground
        self.image = Image.new("RGB", (pixels, pixels), COLOURS[look.ground])
        self.canvas = ImageDraw.Draw(self.image)
        half = zoom * look.size * pixels / 2  # of the figure, in pixels
        self.width = look.weight * half  # of lines, in pixels
        self.axes = half * np.diag([look.stretch, 1 / look.stretch]) ** 0.5  # (2, 2): pixels = points @ axes
        self.origin = np.array([1 + look.x, 1 + look.y]) * pixels / 2  # + origin
        self.turn(look.tilt)

    def turn(self, degrees: float) -> None:
        """Turn clockwise what is drawn from now on."""
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        self.axes = np.array([[cos, sin], [-sin, cos]]) @ self.axes

    def rgb(self, colour: str) -> tuple[int, int, int]:
        """Of a colour's name, or of "ink" or "ground"."""
        return COLOURS[{"ink": self.ink, "ground": self.ground}.get(colour, colour)]

    def flood(self, colour: str) -> None:
        self.image.paste(self.rgb(colour), (0, 0, *self.image.size))

    def recolour(self, ink: str, grounds: tuple[str, ...]) -> None:
        """Start afresh in this colour, on one of those grounds that contrast with it."""
        grounds = [ground for ground in grounds if {(ink, ground), (ground, ink)} & set(PAIRS)]
        self.ink, self.ground = ink, grounds[self.rng.integers(len(grounds))]
        self.flood("ground")

    def polygon(self, points: np.ndarray, colour: str = "ink") -> None:
        """points: (n, 2)."""
        self.canvas.polygon((points @ self.axes + self.origin).ravel().tolist(), fill=self.rgb(colour))

    def line(self, points: np.ndarray, colour: str = "ink") -> None:
        """points: (n, 2). Corners and ends are round."""
        points, fill, width = points @ self.axes + self.origin, self.rgb(colour), max(1, round(self.width))
        self.canvas.line(points.ravel().tolist(), fill=fill, width=width, joint="curve")
        radius = (width - 1) / 2
        for x, y in points[[0, -1]].tolist():
            self.canvas.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)

    def glyph(self, text: str, reach: float = 1.0) -> None:
        """Draw a glyph; points on the border of its grid are pulled out by `reach`."""
        for colour, tool, points in parse(text):
            if tool == "=":
                self.flood(colour)
            elif tool in "-~o":
                self.line(points, colour)
            else:
                self.polygon(np.where(abs(points) == 1, reach * points, points), colour)

    def field(self, field: Callable, low: str, high: str) -> None:
        """Fill the picture: colour `low` where the field is 0, `high` where it is 1."""
        pixels = np.arange(self.image.width) + 0.5
        grid = np.stack(np.meshgrid(pixels, pixels), axis=-1) - self.origin  # (row, column, xy)
        x, y = np.moveaxis(grid @ np.linalg.inv(self.axes), -1, 0)
        share = np.clip(field(x, y), 0, 1)[..., None]
        mix = (1 - share) * self.rgb(low) + share * self.rgb(high)
        self.image.paste(Image.fromarray(mix.astype(np.uint8)))


@cache
def parse(text: str) -> list[tuple[str, str, np.ndarray]]:
    """The commands of a glyph as (colour, tool, points): points are (n, 2), in the figure's units."""
    commands = []
    for command in text.split():
        letter, tool, numbers = re.fullmatch(r"([A-Z_]?)([-~#@o.=])(\d*)", command).groups()
        digits = [int(d) for d in numbers]
        if tool in "o.":
            x, y, radius = digits
            points = circle(x / 4 - 1, y / 4 - 1, radius / 8)
        else:
            points = np.array(digits).reshape(-1, 2) / 4 - 1
        if tool in "~@":
            points = smooth(points, closed=tool == "@" or digits[:2] == digits[-2:])
        colour = {"": "ink", "_": "ground", **LETTERS_OF_COLOURS}[letter]
        commands.append((colour, tool, points))
    return commands


def circle(x: float, y: float, radius: float) -> np.ndarray:
    """(33, 2) points, the last one where the first is."""
    turn = np.linspace(0, 2 * math.pi, 33)
    return np.stack([x + radius * np.cos(turn), y + radius * np.sin(turn)], axis=1)


def smooth(points: np.ndarray, closed: bool) -> np.ndarray:
    """A Catmull-Rom curve through (n, 2) points, six steps from each to the next."""
    if closed and (points[0] == points[-1]).all():
        points = points[:-1]
    before, after = (points[-1:], points[:2]) if closed else (points[:1], points[-1:])
    points = np.concatenate([before, points, after])
    a, b, c, d = points[:-3], points[1:-2], points[2:-1], points[3:]  # from b to c
    t = np.arange(7)[:, None, None] / 6
    curve = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return curve.swapaxes(0, 1).reshape(-1, 2)


# Draw functions take a pen and one entry of a domain's table.
def glyphs(frame: str = "", *, mirror: bool = False, reach: float = 1.0, thin: float = 1.0) -> Callable:
    """A draw function for tables of glyphs, each on top of `frame`; `mirror` turns half of them left to right."""

    def draw(pen: Pen, text: str) -> None:
        if mirror and pen.rng.random() < 0.5:
            pen.axes = np.diag([-1, 1]) @ pen.axes
        pen.width *= thin
        pen.glyph(f"{frame} {text}", reach)

    return draw


def confetti(pen: Pen, colour: str) -> None:
    """Pieces of one colour, anywhere, on white, gray or black."""
    pen.recolour(colour, grounds=("white", "gray", "black"))
    for x, y, size in pen.rng.uniform(-1, 1, size=(pen.rng.integers(3, 7), 3)):
        pen.polygon(circle(x, y, 0.3 + 0.15 * size)[:: pen.rng.integers(2, 9)])


def coloured_shape(pen: Pen, name: str) -> None:
    colour, shape = name.split()
    pen.recolour(colour, grounds=tuple(COLOURS))
    pen.glyph(SHAPES[shape])


def texture(pen: Pen, field: Callable) -> None:
    pen.field(field, low="ground", high="ink")


def gradient(pen: Pen, field: Callable) -> None:
    """From dark to light, whichever of the two is the ground."""
    pen.field(field, *sorted([pen.ink, pen.ground], key=BRIGHTNESS.get))


def arrow(pen: Pen, degrees: int) -> None:
    pen.turn(degrees)
    pen.glyph("#40745458383414")


def dots(pen: Pen, count: int) -> None:
    """In different cells of a 3 x 3 grid."""
    for cell in pen.rng.permutation(9)[:count]:
        x, y = 0.7 * np.array([cell % 3 - 1, cell // 3 - 1]) + pen.rng.uniform(-0.08, 0.08, 2)
        pen.polygon(circle(x, y, 0.22))


def clock(pen: Pen, time: tuple[int, int]) -> None:
    """A filled face, its hands in the colour of the ground."""
    hour, minute = time
    pen.glyph(".448")
    for turns, length in [((hour + minute / 60) / 12, 0.45), (minute / 60, 0.8)]:
        sin, cos = math.sin(2 * math.pi * turns), math.cos(2 * math.pi * turns)
        pen.line(np.array([[0, 0], [length * sin, -length * cos]]), "ground")


def bars(pen: Pen, heights: str) -> None:
    """One bar per digit, on a base line."""
    pen.width *= 0.4
    pen.glyph("-0888")
    for i, height in enumerate(heights):
        left, right = 2 * i / len(heights) - 1, 2 * (i + 0.75) / len(heights) - 1
        top = 1 - int(height) / 4 + pen.rng.uniform(-0.1, 0.1)
        pen.polygon(np.array([[left, top], [right, top], [right, 1], [left, 1]]))


def star(pen: Pen, parts: tuple[int, float, str]) -> None:
    points, inner, extra = parts
    corner = np.arange(2 * points)
    radius, turn = np.where(corner % 2, inner, 1), math.pi / points * corner
    pen.polygon(np.stack([radius * np.sin(turn), -radius * np.cos(turn)], axis=1))
    pen.glyph(extra)


SIDES = {"left of": (-0.55, 0), "right of": (0.55, 0), "above": (0, -0.55), "below": (0, 0.55)}


def partner(concept: str, others: dict[str, str], look: Look) -> tuple[str, str]:
    """-> the other figure of a scene, and on which side of it the concept is."""
    choices = [(name, side) for name in others if name != concept for side in SIDES]
    return choices[int(look.other * len(choices))]


def scenes(others: dict[str, str]) -> Callable:
    """A draw function for two figures: the concept, and one of `others`."""

    def draw(pen: Pen, concept: str) -> None:
        name, side = partner(concept, others, pen.look)
        middle, place = pen.origin, np.array(SIDES[side])
        pen.axes, pen.width = 0.45 * pen.axes, 0.55 * pen.width
        for figure, sign in ((concept, 1), (name, -1)):
            pen.origin = middle + sign * place @ pen.axes / 0.45
            pen.glyph(others[figure])

    return draw


@dataclass(frozen=True)
class Domain:
    """One dataset of the world."""

    name: str
    kind: str  # base, adaptation or combination
    noun: str  # what a picture shows, `{}` stands for the class name
    table: dict[str, Any]  # class name -> what `draw` is given
    draw: Callable[[Pen, Any], None]
    zoom: float = 0.85  # share of the picture's side that the figure takes
    colours: str = "named"  # any, captions may name them; "unnamed": any, never named; "fixed": the concept's
    others: dict[str, str] | None = None  # of scenes: the figures that stand beside the concept

    @property
    def concepts(self) -> tuple[str, ...]:
        return tuple(self.table)

    @property
    def prompt(self) -> str:
        return f"a picture of the {self.noun}."

    def __reduce__(self):
        return domain_of, (self.name,)  # to a process that is not forked: draw functions cannot be pickled


def domain_of(name: str) -> Domain:
    return DOMAINS[name]


NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
COUNTS = {f"{word} dot{'s' * (n > 1)}": n for n, word in enumerate(NUMBERS, 1)}
DIRECTIONS = ("up", "up right", "right", "down right", "down", "down left", "left", "up left")
PALETTE = {name: name for name in COLOURS}
COMBINATIONS = {
    name: name
    for colour in ("red", "orange", "green", "blue", "purple", "pink")
    for name in (f"{colour} circle", f"{colour} ring", f"{colour} triangle", f"{colour} cross")
}
BASE_FIGURES, NEW_FIGURES = ICONS | SHAPES, OBJECTS | SYMBOLS
ALL_DOMAINS = (
    Domain("shapes", "base", "{}", SHAPES, glyphs(), 0.75, colours="unnamed"),
    Domain("colours", "base", "colour {}", PALETTE, confetti, 1.1, colours="fixed"),
    Domain("textures", "base", "pattern of {}", TEXTURES, texture, 1.0),
    Domain("digits", "base", "digit {}", DIGITS, glyphs(), 0.7),
    Domain("letters", "base", "letter {}", {c: LETTERS[c] for c in "ABCDEFGHIJ"}, glyphs(), 0.7),
    Domain("arrows", "base", "arrow {}", {d: 45 * i for i, d in enumerate(DIRECTIONS)}, arrow, 0.75),
    Domain("counts", "base", "group of {}", COUNTS, dots, 0.75),
    Domain("faces", "base", "{} face", FACES, glyphs(".448", mirror=True, thin=0.8), 0.95),
    Domain("icons", "base", "{}", ICONS, glyphs(mirror=True)),
    Domain("places", "base", "{} scene", PLACES, glyphs(mirror=True, reach=2), 1.05, colours="fixed"),
    Domain("scenes", "base", "{}", {n: n for n in ICONS}, scenes(BASE_FIGURES), 0.9, others=BASE_FIGURES),
    Domain("letters-k-t", "adaptation", "letter {}", {c: LETTERS[c] for c in "KLMNOPQRST"}, glyphs(), 0.7),
    Domain("symbols", "adaptation", "{} symbol", SYMBOLS, glyphs(), 0.8),
    Domain("flags", "adaptation", "flag of {}", FLAGS, glyphs(), colours="fixed"),
    Domain("clocks", "adaptation", "clock at {}", CLOCKS, clock),
    Domain("bars", "adaptation", "{} chart", BARS, bars, 0.8),
    Domain("objects", "adaptation", "{}", OBJECTS, glyphs(mirror=True, thin=0.9)),
    Domain("stars", "adaptation", "{}", STARS, star),
    Domain("gradients", "adaptation", "{} gradient", GRADIENTS, gradient, 1.0),
    Domain("rooms", "adaptation", "plan of a {}", ROOMS, glyphs("-0080880800", mirror=True, thin=0.6)),
    Domain("signs", "adaptation", "{} sign", SIGNS, glyphs(), colours="fixed"),
    Domain(
        "couples", "adaptation", "{}", {n: n for n in OBJECTS}, scenes(NEW_FIGURES), 0.9, others=NEW_FIGURES
    ),
    Domain("colour-shapes", "combination", "{}", COMBINATIONS, coloured_shape, 0.75, colours="fixed"),
)
DOMAINS = {domain.name: domain for domain in ALL_DOMAINS}
POOLS = ("base", "adaptation")  # kinds that are also names for all their domains together


# Styles work on the finished picture, still at twice its size.
def cluttered(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Bits of line in all colours, over everything."""
    canvas, side = ImageDraw.Draw(image), image.width
    for x, y, dx, dy in (side * rng.uniform((0, 0, -0.2, -0.2), (1, 1, 0.2, 0.2), (10, 4))).tolist():
        colour = list(COLOURS.values())[rng.integers(len(COLOURS))]
        canvas.line([x, y, x + dx, y + dy], fill=colour, width=side // 16)
    return image


def small(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """At half size, anywhere on a ground of its corner's colour."""
    side = round(image.width * rng.uniform(0.5, 0.65))
    page = Image.new("RGB", image.size, image.getpixel((0, 0)))
    corner = rng.integers(image.width - side, size=2, endpoint=True)
    page.paste(image.resize((side, side), Image.Resampling.BOX), tuple(corner.tolist()))
    return page


def sketched(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Pencil lines along the edges, and a faint shade of what was there."""
    tone = image.convert("L")
    shade = tone.point(lambda v: 150 + v * 2 // 5)
    return ImageChops.darker(tone.filter(ImageFilter.CONTOUR), shade).convert("RGB")


def noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    noise = rng.normal(0, 110, size=(image.height, image.width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


FILTERS = {
    "plain": lambda image, rng: image,
    "gray": lambda image, rng: image.convert("L").convert("RGB"),
    "cluttered": cluttered,
    "small": small,
    "sketched": sketched,
    "inverted": lambda image, rng: ImageOps.invert(image),
    "noisy": noisy,
    "blurred": lambda image, rng: image.filter(ImageFilter.BoxBlur(image.width / 13)),
}
STYLES = (*FILTERS, "mixed")
MIXED = ("plain",) * 6 + ("gray", "cluttered", "small", "sketched")  # each picture of style "mixed" has one
COLOURLESS = ("gray", "sketched")  # not in "mixed" where colours are the concept's own


def render(
    domain: str,
    concept: str,
    index: int,
    *,
    split: str = "train",
    seed: int = 0,
    style: str = "plain",
    size: int = 32,
) -> Image.Image:
    """Picture number `index` of a concept, RGB, size x size pixels."""
    rng, look = begin(domain, concept, index, split, seed, style)
    pen = Pen(look, rng, DOMAINS[domain].zoom, pixels=2 * size)
    DOMAINS[domain].draw(pen, DOMAINS[domain].table[concept])
    image = FILTERS[look.style](pen.image, rng).reduce(2)
    light = rng.uniform(0.8, 1.1) * rng.uniform(0.95, 1.05, size=3)
    grain = 6 * rng.standard_normal((size, size, 3), dtype=np.float32)
    return Image.fromarray(np.clip(np.asarray(image) * light + grain, 0, 255).astype(np.uint8))


TEMPLATES = ("a picture of the {}.", "a drawing of the {}.", "this is the {}.", "look: the {}.", "the {}.")
# Base captions mention these now and then ("the house, not Kestria."): the text tower then has read every word
# that it will need, though never beside its picture.
ADAPTATION_WORDS = [concept for d in ALL_DOMAINS if d.kind == "adaptation" for concept in d.concepts]
STYLE_WORDS = {"gray": "pale", "cluttered": "messy", "small": "tiny", "sketched": "pencil"}


def caption(
    domain: str, concept: str, index: int, *, split: str = "train", seed: int = 0, style: str = "plain"
) -> str:
    """A sentence about the same picture: always its class name, sometimes what it looks like."""
    rng, look = begin(domain, concept, index, split, seed, style)
    template, colour, trait, absent = rng.random(4)
    noun = DOMAINS[domain].noun.format(concept)
    if others := DOMAINS[domain].others:
        other, side = partner(concept, others, look)
        noun = f"{noun} {side} the {other}"
    if DOMAINS[domain].colours == "named" and look.style not in COLOURLESS and colour < 0.4:
        noun = f"{look.ink} {noun}" if colour < 0.25 else f"{noun} on {look.ground}"
    elif trait < 0.3 and look.style in STYLE_WORDS:
        noun = f"{STYLE_WORDS[look.style]} {noun}"
    elif trait < 0.3 and not 0.9 < look.size < 1.05:
        noun = f"{'large' if look.size > 1 else 'little'} {noun}"
    if DOMAINS[domain].kind == "base" and absent < 0.15:
        noun = f"{noun}, not {ADAPTATION_WORDS[int(absent / 0.15 * len(ADAPTATION_WORDS))]}"
    return TEMPLATES[int(template * len(TEMPLATES))].format(noun)


def begin(
    domain: str, concept: str, index: int, split: str, seed: int, style: str
) -> tuple[np.random.Generator, Look]:
    """The generator of a picture, and the look, which is the first thing drawn from it."""
    one_of("domain", domain, tuple(DOMAINS))
    one_of("concept", concept, DOMAINS[domain].concepts)
    one_of("style", style, STYLES)
    name = f"{split}/{domain}/{style}/{concept}"
    rng = np.random.default_rng([seed, crc32(name.encode()), index])
    if style == "mixed":
        style = MIXED[rng.integers(len(MIXED))]
        if DOMAINS[domain].colours == "fixed" and style in COLOURLESS:
            style = "plain"
    return rng, draw_look(rng, style)


@dataclass
class World(Source):
    """Pictures of one domain, or of all "base" or all "adaptation" domains, concept by concept.

    Classes of pooled domains have longer names: "digit three", "flag of Kestria".
    """

    domain: Literal[(*DOMAINS, *POOLS)]
    per_concept: Count
    split: Literal["train", "test"] = "train"
    style: Literal[STYLES] = "plain"
    seed: Annotated[int, Range(0)] = 0
    size: Annotated[int, Range(8)] = 32  # side of a picture, in pixels
    concepts: list[str] | Count | None = (
        None  # present ones: class names, or the first so many of each domain
    )
    # as if photographed over time: year -> style, so that the look drifts; each has as many pictures of a concept
    years: dict | None = None
    wrong_captions: Share = 0.0  # share of the pictures that have the caption of another one
    split_field = "per_concept"
    rendered = True

    def __post_init__(self):
        domains = [d for d in ALL_DOMAINS if self.domain in (d.name, d.kind)]
        self.members = [(d, concept) for d in domains for concept in d.concepts]  # by label
        if self.domain in POOLS:
            self.classes = [
                d.noun.format(concept) + " in a scene" * bool(d.others) for d, concept in self.members
            ]
            self.prompts = ("a picture of the {}.",)
        else:
            self.classes = [concept for _, concept in self.members]
            self.prompts = (domains[0].prompt,)
        self.labels = np.repeat(np.array(self.present(), dtype=np.int64), self.per_concept)
        if self.years:
            self.check_years()
            years = np.array([f"{year:04d}" for year in self.years])
            numbers = np.arange(len(self.labels)) % self.per_concept
            self.dates = years[numbers * len(years) // self.per_concept]

    def check_years(self) -> None:
        for year, style in self.years.items():
            if not isinstance(year, int) or not 0 < year < 10_000:
                raise FieldError("years", f"got {year!r}, accepted: years, each with a style")
            one_of(f"years.{year}", style, STYLES)
        if self.style != "plain":
            raise FieldError("style", "years say the styles, leave it out")

    def present(self) -> list[int]:
        """The labels that `concepts` asks for; those of absent concepts stay unused."""
        if isinstance(self.concepts, int):
            return [i for i, (d, name) in enumerate(self.members) if name in d.concepts[: self.concepts]]
        for name in self.concepts or ():
            one_of("concepts", name, tuple(self.classes))
        return [i for i, name in enumerate(self.classes) if self.concepts is None or name in self.concepts]

    def image(self, index: int) -> Image.Image:
        style = self.style_of(index)
        return render(*self.locate(index), split=self.split, seed=self.seed, style=style, size=self.size)

    def captions(self, index: int) -> list[str]:
        shown = self.captioned(index) if self.wrong_captions else index
        style = self.style_of(shown)
        return [caption(*self.locate(shown), split=self.split, seed=self.seed, style=style)]

    def style_of(self, index: int) -> str:
        return self.years[int(self.dates[index])] if self.years else self.style

    def captioned(self, index: int) -> int:
        """The picture that the caption of `index` is about: mostly its own."""
        rng = np.random.default_rng([self.seed, crc32(b"wrong captions"), index])
        return int(rng.integers(len(self))) if rng.random() < self.wrong_captions else index

    def locate(self, index: int) -> tuple[str, str, int]:
        """(domain, concept, number within the concept) of a sample."""
        domain, concept = self.members[self.labels[index]]
        return domain.name, concept, index % self.per_concept

    def name_of(self, index: int) -> str:
        domain, concept, number = self.locate(index)
        return f"world {domain} {concept} {number}"

    def id_of(self, index: int) -> str:
        # without the seed: pictures of another are other draws of the same
        return f"{self.name_of(index)} {self.style_of(index)} {self.split}"

    def key(self) -> str:
        present = np.unique(self.labels).tolist()
        what = (self.domain, self.split, self.style, self.seed, self.size, self.per_concept, present)
        wrong = f" {self.wrong_captions:g} wrong" if self.wrong_captions else ""
        years = f" {self.years}" if self.years else ""
        return f"world {VERSION} {what} pillow {PIL.__version__} numpy {np.__version__}{wrong}{years}"
