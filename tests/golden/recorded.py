"""A recorded file as the agents of jaxrl see it: settings, parameters, batches, and the replay of its updates."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.agents.parts import Net
from jaxrl.types import Batch, Spec


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The content of a file: numbers by their keys, and what it says of itself."""

    numbers: dict[str, Any]
    meta: dict[str, Any]
    hparams: dict[str, Any]
    arch: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        """Returns the number or array under a key."""
        return self.numbers[key]

    def below(self, prefix: str) -> dict[str, Any]:
        """Returns everything whose key begins with a prefix, by its whole key."""
        return {key: value for key, value in self.numbers.items() if key.startswith(prefix)}

    def named(self, prefix: str) -> dict[str, jax.Array]:
        """Returns everything whose key begins with a prefix, by the rest of its key."""
        return {key.removeprefix(prefix): jnp.asarray(value) for key, value in self.below(prefix).items()}

    # Settings of a network, read off its description

    def layers(self, net: str) -> list[dict[str, Any]]:
        """Returns a network's layers: `dense` [in, out], and what comes `then`."""
        return self.arch["networks"][net]["layers"]

    def hidden(self, net: str) -> tuple[int, ...]:
        """Returns the widths of a network's hidden layers."""
        return tuple(layer["dense"][1] for layer in self.layers(net)[:-1])

    def norm(self, net: str) -> str:
        """Returns where a network has its layer norm."""
        then = [layer["then"] for layer in self.layers(net)[:-1]]
        if "layer_norm" not in then[0]:
            return "none"
        if then[0][0] != "layer_norm":
            return "after"
        return "before" if "layer_norm" in then[-1] else "before_but_last"

    def activation(self, net: str) -> str:
        """Returns a network's activation."""
        (name,) = {word for layer in self.layers(net)[:-1] for word in layer["then"]} - {"layer_norm"}
        return {"gelu_tanh": "gelu", "mish": "mish", "relu": "relu"}[name]

    def net(self, net: str) -> Net:
        """Returns the layers of a network."""
        return Net(self.hidden(net), self.activation(net), self.norm(net))

    def critics(self, net: str) -> int:
        """Returns the size of an ensemble."""
        return self.arch["networks"][net]["ensemble_size"]

    def time(self, net: str) -> dict[str, Any]:
        """Returns how a flow sees the time, as fields of a `parts.FlowPolicy`."""
        embedding = self.arch["networks"][net]["time_embedding"]
        return {"time": "raw"} if embedding == "raw" else {"time": embedding["kind"], "time_size": embedding["size"]}

    # Parameters

    def params(self, net: str, like: Any) -> Any:
        """Returns a network's recorded parameters in the tree that jaxrl's network of that shape has."""
        flat, tree = jax.tree_util.tree_flatten_with_path(like)
        leaves = []
        for path, leaf in flat:
            value = jnp.asarray(self[f"params/{net}/{self.place(net, path)}"])
            assert value.shape == leaf.shape, (net, path, value.shape, leaf.shape)
            leaves.append(value)
        assert len(leaves) == len(self.below(f"params/{net}/"))
        return tree.unflatten(leaves)

    def place(self, net: str, path: tuple) -> str:
        """Returns the file's name of a parameter of ours, such as layer0/kernel or layer1/ln_scale."""
        *_, layer, leaf = (part.key for part in path)
        if leaf == "log_std":
            return "log_stds"
        kind, _, number = layer.partition("_")
        if kind == "Dense":
            return f"layer{number}/{leaf}"
        normed = [i for i, each in enumerate(self.layers(net)) if "layer_norm" in each["then"]]
        return f"layer{normed[int(number)]}/ln_{leaf}"

    def by_place(self, net: str, params: Any) -> dict[str, jax.Array]:
        """Returns a tree of ours under the file's names."""
        return {self.place(net, path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    # Batches and updates

    def one_step(self) -> Batch:
        """Returns the batch of a file of single transitions."""
        batch = self.named("batch/")
        count = len(batch["observations"])
        return Batch(
            obs=batch["observations"],
            actions=batch["actions"][:, None],
            rewards=batch["rewards"][:, None],
            valid=jnp.ones((count, 1)),
            terminated=batch["masks"] == 0,
            next_obs=batch["next_observations"],
            steps=jnp.ones(count, jnp.int32),
        )

    def chunked(self) -> Batch:
        """Returns the batch of a file of windows, whose rewards are running discounted sums."""
        batch = self.named("batch/")
        count, length, _ = batch["actions"].shape
        return Batch(
            obs=batch["observations"],
            actions=batch["actions"],
            rewards=jnp.zeros((count, length)).at[:, 0].set(batch["rewards"][:, -1]),
            valid=batch["valid"],
            terminated=batch["masks"][:, -1] == 0,
            next_obs=batch["next_observations"][:, -1],
            steps=jnp.full(count, length, jnp.int32),
        )

    def spec(self, goal: int = 0) -> Spec:
        """Returns the sizes of the task."""
        return Spec(self["batch/observations"].shape[1] + goal, self["batch/actions"].shape[-1], goal)

    def state(self, agent: Any, spec: Spec, nets: dict[str, str], slow: str = "", target: str = "") -> Any:
        """Returns the agent's state with the recorded parameters; `nets` is {ours: theirs}.

        The network `slow` of ours has a target, which they call `target`.
        """
        shapes = jax.eval_shape(lambda: agent.init(jax.random.key(0), spec))
        params = {ours: self.params(theirs, shapes.params[ours]) for ours, theirs in nets.items()}
        assert params.keys() == shapes.params.keys()
        state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)  # so begin Adam and its count
        return dataclasses.replace(
            state, params=params, target={slow: self.params(target, params[slow])} if slow else {}
        )

    def updates(
        self,
        agent: Any,
        state: Any,
        batch: Batch,
        nets: dict[str, str],
        terms: Callable[[jax.Array, dict], dict[str, jax.Array]],
        target: str = "",
        draws: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] = lambda draws: draws,
    ) -> dict[str, Any]:
        """Returns all that the file expects of its updates: losses, gradients, norms of parameters and their changes.

        `terms` maps the total loss and the agent's metrics to the file's names of losses.
        """
        got: dict[str, Any] = {}
        first = networks(state, nets, target)
        loss = jax.jit(jax.value_and_grad(agent.loss, has_aux=True))
        learn = jax.jit(agent.learn)
        for k in range(self.meta["num_update_steps"]):
            random, step = draws(self.named(f"draws/step{k}/")), f"expected/step{k}"
            (total, metrics), gradient = loss(state.params, state, batch, random)
            got |= {f"{step}/loss/{name}": value for name, value in terms(total, metrics).items()}
            for ours, theirs in nets.items():
                got[f"{step}/grad_norm/{theirs}"] = norm(gradient[ours])
                places = self.by_place(theirs, gradient[ours])
                got |= {f"{step}/grads/{theirs}/{place}": leaf for place, leaf in places.items()}
            before = networks(state, nets, target)
            state, _ = learn(state, batch, random)
            for name, params in networks(state, nets, target).items():
                got[f"{step}/after/param_norm/{name}"] = norm(params)
                got[f"{step}/after/update_norm/{name}"] = distance(params, before[name])
        for name, params in networks(state, nets, target).items():
            got[f"expected/final/drift_norm/{name}"] = distance(params, first[name])
        return got


def networks(state: Any, nets: dict[str, str], target: str) -> dict[str, Any]:
    """Returns the parameters of all networks, the slow one included, under the file's names."""
    slow = dict(zip([target], state.target.values(), strict=False))  # there is one at most
    return {theirs: state.params[ours] for ours, theirs in nets.items()} | slow


def distance(a: Any, b: Any) -> float:
    """Returns the L2 norm of the difference of two trees."""
    return norm(jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b))


def norm(tree: Any) -> float:
    """Returns the L2 norm of a tree."""
    return float(np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree))))
