"""Combinators and the overlay of settings."""

import dataclasses

import pytest

from moe.config import Config
from moe.errors import UserError
from moe.sweep.variants import Variant, axis, chain, check_names, flatten, named, overlay, product, zipped

GAMMAS = axis('balance.gamma', (0.1, 0.01))
RULES = named({'sign': {'balance.bias_rule': 'sign'}, 'off': {'balance.bias_rule': 'none'}})


def test_axis_names_its_variants_by_the_last_part_of_the_key():
  assert [
    Variant('gamma=0.1', {'balance.gamma': 0.1}),
    Variant('gamma=0.01', {'balance.gamma': 0.01}),
  ] == GAMMAS
  assert axis('dispatch', ['local']) == [Variant('dispatch=local', {'dispatch': 'local'})]


def test_product_has_every_combination_last_factor_fastest():
  assert product(RULES, GAMMAS) == [
    Variant('sign,gamma=0.1', {'balance.bias_rule': 'sign', 'balance.gamma': 0.1}),
    Variant('sign,gamma=0.01', {'balance.bias_rule': 'sign', 'balance.gamma': 0.01}),
    Variant('off,gamma=0.1', {'balance.bias_rule': 'none', 'balance.gamma': 0.1}),
    Variant('off,gamma=0.01', {'balance.bias_rule': 'none', 'balance.gamma': 0.01}),
  ]
  assert len(product(RULES, GAMMAS, axis('train.steps', range(5)))) == 20


def test_zip_pairs_and_chain_appends():
  assert [variant.name for variant in zipped(RULES, GAMMAS)] == ['sign,gamma=0.1', 'off,gamma=0.01']
  assert chain(RULES, GAMMAS) == RULES + GAMMAS


@pytest.mark.parametrize(
  ('combine', 'message'),
  [
    (lambda: product(), 'a product of no factors is empty'),
    (lambda: product(RULES, axis('balance.gamma', [])), 'factor 2 of a product of 2 is empty'),
    (lambda: product(GAMMAS, GAMMAS), r"both set 'balance\.gamma'"),
    (lambda: zipped(RULES, GAMMAS[:1]), r'lists of \[2, 1\] variants cannot be zipped'),
    (lambda: zipped([], []), r'lists of \[0, 0\] variants'),
    (lambda: check_names(chain(RULES, RULES)), "two variants are called 'sign'"),
    (lambda: check_names([]), 'no variants'),
    (lambda: check_names(axis('data.paths', ['/etc'])), "'paths=/etc' must consist of letters"),
  ],
)
def test_bad_combinations(combine, message):
  with pytest.raises(UserError, match=message):
    combine()


def test_overlay_changes_what_it_names_and_nothing_else():
  base = Config()
  changed = overlay(base, {'balance.gamma': 0.5, 'dispatch': 'local', 'data.paths': 'a/,b/'})
  assert changed.balance == dataclasses.replace(base.balance, gamma=0.5)
  assert changed == dataclasses.replace(
    base, balance=changed.balance, dispatch='local', data=dataclasses.replace(base.data, paths='a/,b/')
  )


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'balance.gama': 1.0}, "unknown setting 'balance.gama'; the nearest valid one is 'balance.gamma'"),
    ({'gamma': 1.0}, "unknown setting 'gamma'; the nearest valid one is 'balance.gamma'"),
    ({'balance': {}}, "unknown setting 'balance'"),
    ({'train.steps': 1.5}, 'must be of type int'),
    ({'train.steps': '3'}, 'must be of type int'),
    ({'balance.bias_rule': 'magic'}, 'must be one of .*none, .*sign'),
    ({'model.top_k': 99}, r'model\.top_k = 99 is larger'),
  ],
)
def test_overlay_refuses(overrides, message):
  with pytest.raises(UserError, match=message):
    overlay(Config(), overrides)


def test_flat_settings_are_all_settings():
  flat = flatten(Config())
  assert flat['model.d_model'] == Config().model.d_model
  sections = [field for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)]
  assert len(flat) == sum(len(dataclasses.fields(section.type)) for section in sections) + 2  # dispatch, grouped_matmul
