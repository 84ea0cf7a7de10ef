"""Facts about jaxrl.types: what networks see of an observation, what agents require of data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.types import Leaf, Requirements, Spec, requirements

LEAVES = (
    Leaf("state", (2,)),
    Leaf("privileged", (3,)),
    Leaf("camera", (4, 5, 3), "uint8"),
    Leaf("clock", ()),
    Leaf("limbs", (2, 3)),
    Leaf("goal", (2,)),
)


def shapes(obs) -> dict:
    return {name: x.shape for name, x in obs.items()}


def test_an_array_is_seen_whole_and_by_behaviour_without_its_last_entries():
    spec, obs = Spec(5, 1, goal=2), jnp.arange(10.0).reshape(2, 5)
    assert spec.actor(obs) is obs and spec.critic(obs) is obs
    np.testing.assert_array_equal(spec.behaviour(obs), [[0, 1, 2], [5, 6, 7]])
    assert spec.without_goal() == Spec(3, 1) and Spec(3, 1).without_goal() == Spec(3, 1)


def test_each_network_sees_the_keys_that_are_chosen_for_it():
    spec = Spec(LEAVES, 1, 2, actor_keys=("state", "goal"), critic_keys=("privileged",))
    obs = spec.example()
    assert shapes(spec.actor(obs)) == {"state": (2,), "goal": (2,)}
    assert shapes(spec.behaviour(obs)) == {"state": (2,)}
    assert shapes(spec.critic(obs)) == {"privileged": (3,)}


def test_by_default_all_keys_are_seen_numbers_and_matrices_as_vectors():
    spec = Spec(LEAVES, 1, 2)
    obs = jax.tree.map(lambda x: jnp.broadcast_to(x, (7, 6, *x.shape)), spec.example())
    found = spec.actor(obs)
    assert {name: shape[2:] for name, shape in shapes(found).items()} == {
        "state": (2,),
        "privileged": (3,),
        "camera": (4, 5, 3),
        "clock": (1,),
        "limbs": (6,),
        "goal": (2,),
    }
    assert found["camera"].dtype == jnp.uint8
    assert set(spec.behaviour(obs)) == set(obs) - {"goal"}


def test_without_the_goal_a_dict_lacks_its_key():
    spec = Spec(LEAVES, 1, 2, ("state", "goal"), ("privileged", "goal")).without_goal()
    assert spec == Spec(LEAVES[:-1], 1, 0, ("state",), ("privileged",))


def test_an_agent_that_requires_nothing_needs_windows_of_its_chunk():
    @dataclasses.dataclass
    class Plain:
        chunk: int

    @dataclasses.dataclass
    class Backing(Plain):
        backup: int

        def requires(self) -> Requirements:
            return Requirements(window=self.backup, columns=("log_density",))

    assert requirements(Plain(3)) == Requirements(window=3)
    assert requirements(Backing(5, 25)) == Requirements(window=25, columns=("log_density",))
