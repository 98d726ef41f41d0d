"""How much a router's choice tells of the token that it was for, in bits."""

import numpy as np


def entropy(count_LX: np.ndarray) -> np.ndarray:
  """Plug-in entropy of each row of counts, -sum p log2 p, in bits; 0 of a row without counts."""
  count_LX = np.asarray(count_LX, np.float64)
  p_LX = count_LX / np.maximum(count_LX.sum(-1, keepdims=True), 1)
  return -(p_LX * np.log2(np.where(p_LX > 0, p_LX, 1))).sum(-1)


def mutual_information(joint_LVE: np.ndarray) -> np.ndarray:
  """Mutual information of token and expert in each layer, H(V) + H(E) - H(V, E), plug-in, in bits.

  0: the expert says nothing of which token it was; at most the smaller of H(V) and H(E). Of few counts it is too high,
  by about `bias`.

  Args:
    joint_LVE: how often each token id went to each expert, [L, V, E]. A token that goes to K experts counts K times.

  Returns:
    [L].
  """
  joint_LVE = np.asarray(joint_LVE, np.float64)
  both_LX = joint_LVE.reshape(len(joint_LVE), -1)
  return np.maximum(entropy(joint_LVE.sum(2)) + entropy(joint_LVE.sum(1)) - entropy(both_LX), 0)


def bias(joint_LVE: np.ndarray) -> np.ndarray:
  """What the plug-in estimate is expected to be above the truth, in bits: (cells - rows - columns + 1) / (2 N ln 2).

  Miller and Madow's correction of each entropy, (m - 1) / 2N nats of m cells that are not empty and N counts (Miller,
  "Note on the bias of information estimates", 1955), for H(V) + H(E) - H(V, E) as in Roulston, "Estimating the errors
  on measured entropy and mutual information", 1999, equation 27.

  Args:
    joint_LVE: as of `mutual_information`.

  Returns:
    [L]; 0 of a layer without counts. It may be negative where most cells are empty.
  """
  some_LVE, total_L = np.asarray(joint_LVE) > 0, np.asarray(joint_LVE).sum((1, 2))
  cells_L, rows_L, columns_L = some_LVE.sum((1, 2)), some_LVE.any(2).sum(1), some_LVE.any(1).sum(1)
  return np.where(total_L > 0, (cells_L - rows_L - columns_L + 1) / (2 * np.log(2) * np.maximum(total_L, 1)), 0)
