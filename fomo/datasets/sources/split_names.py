"""The words by which people name splits, in names of files and folders and in columns of tables."""

import re

TRAIN = ("train", "training")
TESTS = ("test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation", "holdout")


def words_of(name: str) -> list[str]:
    """shop_Test-2017, PublicTest -> [shop, test, 2017], [public, test]."""
    return [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+|[0-9]+", name)]


def split_in(name: str) -> str | None:
    """ "train", or the word of TESTS that stands in a name; None without either."""
    words = words_of(name)
    test = next((word for word in TESTS if word in words), None)
    return test or ("train" if any(word in words for word in TRAIN) else None)


def chosen_test(names: "set[str] | dict[str, object]") -> str | None:
    """Of several kinds of test split the one that is used."""
    return next((name for name in TESTS if name in names), None)
