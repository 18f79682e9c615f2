"""Invented names, built from syllables.

Every kind of entity has its own syllables, so that a name tells a person from a town. A pool holds far more names than
the world uses: the tokenizer is trained on the pool, hence a name it never met in a fact splits just as a known one
does.
"""

from __future__ import annotations

import random

# A name is a sequence of words and a word is a sequence of syllables, one drawn from each list.
_STARTS = (
    "Bal Bren Cor Dal Dor El Fen Gar Hal Ian Jor Kal Kel Lor Mar Mel Nor Or Per Quin Ral Ser Tal Ul Var Wil Yor Zan"
).split()
_MIDDLES = "a e i o u an ar el en er il in ol on or un".split()

SYLLABLES: dict[str, list[list[list[str]]]] = {
    "person": [
        [
            _STARTS,
            "dan rik vin mon lis na ta ric wen der lo mia ros bert nda sha tia gon ven zo".split(),
        ],
        [
            (
                "Ab Ash Bor Cast Dren Ev Fal Grim Hov Isk Jar Krov Lind Mos Nav Ost Pel Rov Sten Thal Ulm Vel Wex Zor"
            ).split(),
            _MIDDLES,
            "berg dale sson vik mann ley kov escu ton ward strom hart ski quist feld nen rano mar gard".split(),
        ],
    ],
    "company": [
        [
            "Ax By Cyn Dex Ener Flo Gly Hex Inno Jet Kyn Lumo Max Nex Omni Pro Quan Rev Syn Tek Uni Vex Xen Zy".split(),
            "ba co da fa ga la ma na pa ra sa ta va za li mo".split(),
            "corp dyne gen lab link net plex soft tech tron works mark trans form base point".split(),
        ],
    ],
    "city": [
        [
            "Al Bri Cal Dun Es Far Gol Har Il Jas Kir Lan Mon Nar Ol Pal Rad Sal Tor Ur Ver Wes Yar Zel".split(),
            "ba de fi go ka le mi no pa re si to va we".split(),
            "burg bury ford ham haven holm land port stad ton vale ville wick grad mouth field".split(),
        ],
    ],
    "product": [
        [
            "Ar Blu Cry Dyn Evo Fli Gra Hyp Ion Kin Lyt Mag Neo Opt Pix Rapi Sono Turb Vib Zap".split(),
            "bo ce da do fi gu ka lo lu me mi no pi ri sa ta te vo xi zu".split(),
            "cam deck drive gear jack lite max pad phone ride set star tab top wave wing".split(),
        ],
    ],
    "show": [
        [
            (
                "Dark Lost Wild Last Secret Golden Hidden Silent Distant Burning Broken Frozen Crimson "
                "Endless Hollow Royal"
            ).split()
        ],
        [
            "Ab Bel Cin Dra Em Fro Gil Hes Ist Jun Kos Lum Myr Nim Ob Pry Ras Sil Tam Und".split(),
            "ra ve li do nu sha mi to ke la".split(),
            "dor moor spire tide wood crest hollow lake night gate stone fall shire reach cliff mere".split(),
        ],
    ],
}


def pool(kind: str, count: int, rng: random.Random) -> list[str]:
    """`count` distinct names of that kind, in random order.

    Raises ValueError when the syllables cannot make that many.
    """
    words = SYLLABLES[kind]
    possible = 1
    for word in words:
        for syllables in word:
            possible *= len(syllables)
    if count > possible // 2:
        raise ValueError(
            f"{count} names of kind {kind!r} asked for, but only {possible} can be built; ask for at most half"
        )
    names: dict[str, None] = {}
    while len(names) < count:
        names[" ".join("".join(rng.choice(syllables) for syllables in word) for word in words)] = None
    return list(names)
