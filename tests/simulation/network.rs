//! A network that delays, loses, repeats and reorders messages, and whose links break in one direction or both.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use raftexample::membership::NodeId;

use crate::random::Random;

/// How bad the network is, while a link is up.
#[derive(Clone, Debug)]
pub struct Weather {
    /// How long a message travels.
    pub delay: Range<Duration>,
    /// How many of a hundred messages are lost.
    pub lost_percent: u64,
    /// How many of a hundred messages arrive twice.
    pub repeated_percent: u64,
    /// How many of a hundred messages take many times as long as the others.
    pub late_percent: u64,
    /// Whether messages of one link keep their order, as a stream does, or may overtake each other.
    pub in_order: bool,
}

impl Weather {
    /// A good network in one place.
    pub fn fine() -> Weather {
        Weather {
            delay: Duration::from_micros(100)..Duration::from_micros(900),
            lost_percent: 0,
            repeated_percent: 0,
            late_percent: 0,
            in_order: true,
        }
    }

    /// Anything from a good network to a miserable one.
    pub fn draw(random: &mut Random) -> Weather {
        if random.one_in(4) {
            return Weather::fine();
        }
        let shortest = Duration::from_micros(*random.pick(&[50, 500, 5_000]));
        Weather {
            delay: shortest..shortest * (2 + random.below(40) as u32),
            lost_percent: *random.pick(&[0, 1, 5, 25]),
            repeated_percent: *random.pick(&[0, 1, 10]),
            late_percent: *random.pick(&[0, 1, 5]),
            in_order: random.one_in(2),
        }
    }
}

/// How much longer a late message takes than the longest ordinary one.
const LATE_FACTOR: u32 = 40;

/// The links between all nodes.
pub struct Network {
    weather: Weather,
    /// Links that are down: from, to.
    cut: BTreeSet<(NodeId, NodeId)>,
    /// When the last message of a link arrives, to keep the order.
    arrivals: BTreeMap<(NodeId, NodeId), Duration>,
    random: Random,
}

impl Network {
    /// All links are up.
    pub fn new(weather: Weather, random: Random) -> Network {
        Network { weather, cut: BTreeSet::new(), arrivals: BTreeMap::new(), random }
    }

    /// When copies of a message that is sent now arrive, counted from now: none if it is lost.
    pub fn send(&mut self, now: Duration, from: NodeId, to: NodeId) -> Vec<Duration> {
        let Network { weather, random, .. } = self;
        if self.cut.contains(&(from, to)) || random.percent(weather.lost_percent) {
            return Vec::new();
        }
        let copies = 1 + usize::from(random.percent(weather.repeated_percent));
        let mut arrivals = Vec::with_capacity(copies);
        for _ in 0..copies {
            let mut delay = random.time(&weather.delay);
            if random.percent(weather.late_percent) {
                delay += random.time(&(weather.delay.end..weather.delay.end * LATE_FACTOR));
            } else if weather.in_order {
                let last = self.arrivals.entry((from, to)).or_default();
                *last = (*last).max(now + delay);
                delay = *last - now;
            }
            arrivals.push(delay);
        }
        arrivals
    }

    /// Whether a message that left a while ago still arrives.
    pub fn is_up(&self, from: NodeId, to: NodeId) -> bool {
        !self.cut.contains(&(from, to))
    }

    /// Another weather for messages sent from now on.
    pub fn set_weather(&mut self, weather: Weather) {
        self.weather = weather;
    }

    /// Cuts one direction.
    pub fn cut(&mut self, from: NodeId, to: NodeId) {
        self.cut.insert((from, to));
    }

    /// Cuts everything between the members of `left` and of `right`, both ways.
    pub fn split(&mut self, left: &[NodeId], right: &[NodeId]) {
        for &left in left {
            for &right in right.iter().filter(|&&right| right != left) {
                self.cut(left, right);
                self.cut(right, left);
            }
        }
    }

    /// Puts one direction back.
    pub fn mend(&mut self, from: NodeId, to: NodeId) {
        self.cut.remove(&(from, to));
    }

    /// Puts all links back.
    pub fn heal(&mut self) {
        self.cut.clear();
    }

    /// The links that are down.
    pub fn cuts(&self) -> impl Iterator<Item = (NodeId, NodeId)> + '_ {
        self.cut.iter().copied()
    }

    /// Breaks links in one of the patterns that have broken systems before; says which.
    pub fn draw_partition(&mut self, nodes: &[NodeId]) -> String {
        let mut order = nodes.to_vec();
        self.random.shuffle(&mut order);
        let (first, rest) = order.split_first().expect("a cluster has nodes");
        let half = order.len() / 2;
        match self.random.below(6) {
            0 => {
                self.split(&[*first], rest);
                format!("{first} is alone")
            }
            1 => {
                self.split(&order[..half], &order[half..]);
                format!("{:?} | {:?}", &order[..half], &order[half..])
            }
            2 => {
                // Both halves see the first, and not each other: a bridge.
                let (left, right) = rest.split_at(rest.len() / 2);
                self.split(left, right);
                format!("{left:?} - {first} - {right:?}")
            }
            3 => {
                rest.iter().for_each(|&to| self.cut(*first, to));
                format!("nobody hears {first}")
            }
            4 => {
                rest.iter().for_each(|&from| self.cut(from, *first));
                format!("{first} hears nobody")
            }
            _ => {
                let to = *self.random.pick(rest);
                self.cut(*first, to);
                format!("{to} does not hear {first}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fine_network_delivers_once_and_in_order() {
        let mut network = Network::new(Weather::fine(), Random::new(1));
        let mut last = Duration::ZERO;
        for sent in (0..1000).map(|n| Duration::from_micros(n * 10)) {
            let arrivals = network.send(sent, 1, 2);
            assert_eq!(arrivals.len(), 1);
            assert!(sent + arrivals[0] >= last);
            last = sent + arrivals[0];
        }
    }

    #[test]
    fn a_bad_network_loses_repeats_and_reorders() {
        let weather = Weather { lost_percent: 20, repeated_percent: 20, in_order: false, ..Weather::fine() };
        let mut network = Network::new(weather, Random::new(2));
        let arrivals: Vec<_> = (0..1000).map(|_| network.send(Duration::ZERO, 1, 2)).collect();
        assert!(arrivals.iter().any(Vec::is_empty));
        assert!(arrivals.iter().any(|copies| copies.len() == 2));
        assert!(!arrivals.concat().is_sorted());
    }

    #[test]
    fn links_break_one_way_and_heal() {
        let mut network = Network::new(Weather::fine(), Random::new(3));
        network.cut(1, 2);
        assert!(network.send(Duration::ZERO, 1, 2).is_empty());
        assert_eq!(network.send(Duration::ZERO, 2, 1).len(), 1);
        network.split(&[3], &[1, 2]);
        assert_eq!(network.cuts().collect::<Vec<_>>(), [(1, 2), (1, 3), (2, 3), (3, 1), (3, 2)]);
        network.mend(1, 2);
        assert!(network.is_up(1, 2) && !network.is_up(3, 2));
        network.heal();
        assert!(network.is_up(3, 2));
    }

    #[test]
    fn each_partition_cuts_something_and_leaves_something() {
        for seed in 0..100 {
            let mut network = Network::new(Weather::fine(), Random::new(seed));
            let name = network.draw_partition(&[1, 2, 3, 4, 5]);
            let cuts = network.cuts().count();
            assert!(cuts > 0 && cuts < 20, "{name} cuts {cuts}");
        }
    }
}
