"""The private APIs of `data.compat` exist in the installed versions."""

import ray.data

from data.compat import pausing_callback


def test_pausing_callback_is_a_ray_execution_callback() -> None:
    pauses: list[float] = []

    def pause() -> float:
        pauses.append(0.0)
        return 0.0

    callback = pausing_callback(pause)
    assert [base.__name__ for base in callback.__mro__[1:-1]] == ["ExecutionCallback"]
    callback().on_execution_step(None)
    assert pauses == [0.0]
    assert hasattr(ray.data.DataContext(), "custom_execution_callback_classes")
