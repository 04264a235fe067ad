"""The embedded corpus: sessions that do not depend on each other, and a quality that only replies can tell."""

import numpy as np

from data.corpus import synthetic
from data.corpus.schema import Conversation


def sessions(count: int) -> list[Conversation]:
    return list(synthetic.corpus(sessions=count, turns=20, seed=4).conversations)


def test_a_session_is_the_same_whatever_the_number_of_others() -> None:
    for few, many in zip(sessions(2), sessions(5), strict=False):
        assert few.quality == many.quality
        for one, other in zip(few.turns, many.turns, strict=True):
            assert (one.text, one.label, one.start, one.end) == (other.text, other.label, other.start, other.end)
            assert one.audio is other.audio is None or np.array_equal(one.audio, other.audio)


def test_a_good_therapist_replies_to_what_he_heard_and_a_poor_one_never() -> None:
    made = sessions(12)
    assert {conversation.quality for conversation in made} == set(synthetic.QUALITIES)
    for conversation in made:
        for heard, reply in zip(conversation.turns[1::2], conversation.turns[2::2], strict=False):
            fitting = synthetic.REPLIES[heard.label]
            assert (
                reply.text == fitting
                if conversation.quality == "high"
                else reply.text not in synthetic.REPLIES.values()
            )
