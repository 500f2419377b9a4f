"""Draw the project's own benchmarks: a procedural world of dresses, shirts and tops in other benchmarks' files.

The names below are FashionIQ's; `cirr` and `circo` hold those of the other shapes.
"""

from .attributes import Garment as Garment
from .drawing import draw as draw
from .drawing import draw_for_name as draw_for_name
from .fashioniq import WORLD as WORLD
from .fashioniq import FashionIQGarments as FashionIQGarments
from .fashioniq import write_fashioniq as write_fashioniq
from .wording import words as words

GarmentsConfig = FashionIQGarments
make_garments = WORLD.make
