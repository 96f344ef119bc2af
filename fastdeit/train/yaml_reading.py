"""YAML as configurations are written in: a key given twice is a mistake, where PyYAML silently takes the last."""

from typing import Any


def read_yaml(text: str) -> Any:
    """The plain values that text holds.

    Raises:
        ValueError: it is not YAML, or a mapping has a key twice. One line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":  # of <<, which the mapping's own keys override
                    continue
                name = self.construct_object(key, deep=True)
                if name.__hash__ and name in seen:
                    raise yaml.MarkedYAMLError(problem=f"{name!r} is given twice", problem_mark=key.start_mark)
                if name.__hash__:
                    seen.add(name)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of a date that is none, say
        raise ValueError(" ".join(str(error).split())) from None
