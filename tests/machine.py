# SPDX-License-Identifier: Apache-2.0
"""A machine that makes the moves of a schedule."""


class Machine:
    """Makes the moves on integers, refuses the impossible ones, and counts."""

    def __init__(self, kept):
        self.kept, self.held, self.visited = set(kept), set(), []
        self.steps = self.loads = self.checks = self.most_held = 0
        self.at = None

    def run(self, schedule):
        for word, index in schedule:
            getattr(self, word)(index)
        assert not self.held
        return self

    def load(self, index):
        assert index in self.kept
        self.at, self.loads = index, self.loads + 1

    def recall(self, index):
        assert index in self.held
        self.at = index

    def step(self, index):
        assert self.at == index
        self.at, self.steps = index + 1, self.steps + 1

    def hold(self, index):
        assert self.at == index
        assert index not in self.held
        self.held.add(index)
        self.most_held = max(self.most_held, len(self.held))

    def drop(self, index):
        self.held.remove(index)

    def check(self, index):
        assert self.at == index - 1
        assert index in self.kept
        self.checks += 1

    def visit(self, index):
        assert self.at == index
        self.visited.append(index)
