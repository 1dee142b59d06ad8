"""The tile list that all systems are given, and the tile table that they leave: level-0 pixels, a row per tile."""
import csv
import pathlib

PLACE = ["minx", "miny", "width", "height"]


def read_places(path):
    """(minx, miny, width, height) of every tile of a list."""
    with open(path, newline="") as file:
        return [tuple(int(row[name]) for name in PLACE) for row in csv.DictReader(file)]


def write_places(path, places):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([PLACE, *places])


def table_of(out, slide):
    """Where the tile table of a slide lies in the results of a run."""
    return pathlib.Path(out) / "model-outputs-csv" / f"{pathlib.Path(slide).stem}.csv"


def write_table(path, places, probabilities):
    """Place and probabilities of every tile, as slidestream and WSInfer write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(PLACE + [f"prob_c{index}" for index in range(len(probabilities[0]))])
        writer.writerows([*place, *row] for place, row in zip(places, probabilities, strict=True))


def read_table(path):
    """Place of a tile to its probabilities."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))[1:]
    return {tuple(int(float(value)) for value in row[:4]): [float(value) for value in row[4:]] for row in rows}
