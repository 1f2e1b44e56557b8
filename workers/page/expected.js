/** Rewards to expect at settings that were not evaluated, from those that were. No DOM here. */

import { ANCHORS } from "./methods.js";

const CLOSEST = 1e-4;
const RIDGE = 1e-4;

/**
 * {rewards, beyond} by a locally weighted linear fit over lambda * w, or null if the method was not evaluated.
 *
 * In lambda * w the base is the origin and every adapter a unit vector, so weights and lambda are one space.
 * `beyond`: lambda is larger than any that was evaluated; values never leave the range of the points.
 */
export function expectRewards(evaluation, settings, names) {
  const known = evaluation.points.filter(({ method }) => method === settings.method || ANCHORS.has(method));
  if (!known.some(({ method }) => method === settings.method)) return null;
  const here = coefficients(settings, names);
  const places = known.map((point) => coefficients(point, names).map((value, index) => value - here[index]));
  const rewards = {};
  for (const reward of evaluation.rewards) {
    const values = known.map((point) => point.rewards[reward].mean);
    const fitted = fitAtOrigin(places, values);
    rewards[reward] = Math.min(Math.max(...values), Math.max(Math.min(...values), fitted));
  }
  const furthest = Math.max(...known.map((point) => point.kl_lambda));
  return { rewards, beyond: settings.kl_lambda > furthest + 1e-6 };
}

const coefficients = ({ weights, kl_lambda }, names) => names.map((name) => kl_lambda * (weights[name] ?? 0));

/** The constant of a linear fit in which close points count most. */
function fitAtOrigin(places, values) {
  const size = places[0].length + 1;
  const matrix = Array.from({ length: size }, () => new Array(size + 1).fill(0));
  let total = 0;
  places.forEach((place, index) => {
    const distance = place.reduce((sum, value) => sum + value * value, CLOSEST);
    const weight = 1 / (distance * distance);
    const row = [1, ...place];
    total += weight;
    for (let i = 0; i < size; i += 1) {
      for (let j = 0; j < size; j += 1) matrix[i][j] += weight * row[i] * row[j];
      matrix[i][size] += weight * row[i] * values[index];
    }
  });
  // Slopes that the points leave open stay flat.
  for (let i = 1; i < size; i += 1) matrix[i][i] += RIDGE * Math.min(total, places.length / (CLOSEST + 1));
  return solve(matrix)[0];
}

/** Gaussian elimination of an augmented matrix, with pivoting. */
function solve(matrix) {
  const size = matrix.length;
  for (let column = 0; column < size; column += 1) {
    let best = column;
    for (let row = column + 1; row < size; row += 1) {
      if (Math.abs(matrix[row][column]) > Math.abs(matrix[best][column])) best = row;
    }
    [matrix[column], matrix[best]] = [matrix[best], matrix[column]];
    for (let row = column + 1; row < size; row += 1) {
      const factor = matrix[row][column] / matrix[column][column];
      for (let at = column; at <= size; at += 1) matrix[row][at] -= factor * matrix[column][at];
    }
  }
  const result = new Array(size).fill(0);
  for (let row = size - 1; row >= 0; row -= 1) {
    let rest = matrix[row][size];
    for (let at = row + 1; at < size; at += 1) rest -= matrix[row][at] * result[at];
    result[row] = rest / matrix[row][row];
  }
  return result;
}
