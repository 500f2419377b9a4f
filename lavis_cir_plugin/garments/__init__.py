"""Draw the project's own benchmarks: generated dresses, shirts and tops in the files of other benchmarks.

The names below belong to FashionIQ's files. The modules `cirr`, `circo` and `questions` hold those of other benchmarks.
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
