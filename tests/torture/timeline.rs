//! A picture of what happened around a moment: what was done to the nodes, who led, and what clients did.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::ops::Range;
use std::time::Duration;

use raftexample::membership::NodeId;

use crate::chaos::Event;
use crate::followers::Observation;
use crate::history::{End, Operation, Request};

const LABELS_WIDTH: f64 = 110.0;
const WIDTH: f64 = 1500.0;
const ROW_HEIGHT: f64 = 22.0;
/// The narrowest bar that can be seen and pointed at.
const BAR_WIDTH_MIN: f64 = 2.0;
/// A bar below has no room for text.
const TEXT_WIDTH_MIN: f64 = 30.0;

/// What there is to draw.
pub struct Scene<'a> {
    /// The time that is shown.
    pub window: Range<Duration>,
    /// All that is to be shown of what clients did.
    pub operations: Vec<&'a Operation>,
    /// Those of them that are wrong.
    pub concerned: &'a [Operation],
    /// All that was done.
    pub events: &'a [Event],
    /// What the nodes said of themselves.
    pub observations: &'a [Observation],
}

/// Text for HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// One bar of a row.
struct Bar<'a> {
    from: Duration,
    until: Duration,
    class: &'static str,
    text: String,
    title: &'a str,
}

struct Drawing<'a> {
    scene: &'a Scene<'a>,
    svg: String,
    rows: usize,
}

/// The scene as SVG.
pub fn draw(scene: &Scene<'_>) -> String {
    let mut drawing = Drawing { scene, svg: String::new(), rows: 0 };
    drawing.all().expect("a string takes everything");
    let height = (drawing.rows + 1) as f64 * ROW_HEIGHT;
    let width = LABELS_WIDTH + WIDTH;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\">\n\
         <style>{STYLE}</style>\n{}</svg>\n",
        drawing.svg
    )
}

const STYLE: &str = "text{font:11px sans-serif;fill:#222}line{stroke:#ddd}rect{stroke:#fff;stroke-width:.5}\
    .fault{fill:#e8a33d}.network{fill:#d9c04a}.leader{fill:#3a7d44}.follower{fill:#cfe3d2}.other{fill:#b8b8d8}\
    .read{fill:#7aa6d8}.write{fill:#8a6fc0}.refused{fill:#ccc}.unknown{fill:#fff;stroke:#c60;stroke-dasharray:3}\
    .wrong{stroke:#d00;stroke-width:3}";

impl Drawing<'_> {
    fn all(&mut self) -> fmt::Result {
        self.axis()?;
        let scene = self.scene;
        let network = scene.events.iter().filter(|event| event.nodes.is_empty());
        self.events("network", network.collect(), "network")?;
        let named = scene.events.iter().flat_map(|event| &event.nodes);
        let mut nodes: Vec<NodeId> = named.chain(scene.observations.iter().map(|seen| &seen.node)).copied().collect();
        nodes.sort_unstable();
        nodes.dedup();
        for node in nodes {
            let done = scene.events.iter().filter(|event| event.nodes.contains(&node)).collect();
            self.roles(node)?;
            self.events(&format!("node {node}: faults"), done, "fault")?;
        }
        self.clients()
    }

    fn x(&self, time: Duration) -> f64 {
        let window = &self.scene.window;
        let time = time.clamp(window.start, window.end) - window.start;
        LABELS_WIDTH + WIDTH * time.as_secs_f64() / (window.end - window.start).as_secs_f64().max(1e-6)
    }

    fn axis(&mut self) -> fmt::Result {
        let window = self.scene.window.clone();
        for part in 0..=10 {
            let time = window.start + (window.end - window.start) * part / 10;
            let x = self.x(time);
            writeln!(self.svg, "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"100%\"/>")?;
            writeln!(self.svg, "<text x=\"{:.1}\" y=\"14\">{:.2} s</text>", x + 2.0, time.as_secs_f64())?;
        }
        self.rows += 1;
        Ok(())
    }

    fn row(&mut self, label: &str, bars: &[Bar<'_>]) -> fmt::Result {
        let y = self.rows as f64 * ROW_HEIGHT;
        self.rows += 1;
        writeln!(self.svg, "<text x=\"2\" y=\"{:.1}\">{}</text>", y + 15.0, escape(label))?;
        for Bar { from, until, class, text, title } in bars {
            let (x, end) = (self.x(*from), self.x(*until));
            let width = (end - x).max(BAR_WIDTH_MIN);
            writeln!(
                self.svg,
                "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{:.1}\" class=\"{class}\"><title>{}</title></rect>",
                y + 2.0,
                ROW_HEIGHT - 4.0,
                escape(title)
            )?;
            if width > TEXT_WIDTH_MIN {
                let fits = (width / 6.0) as usize;
                let text: String = text.chars().take(fits).collect();
                writeln!(self.svg, "<text x=\"{:.1}\" y=\"{:.1}\">{}</text>", x + 2.0, y + 15.0, escape(&text))?;
            }
        }
        Ok(())
    }

    fn events(&mut self, label: &str, events: Vec<&Event>, class: &'static str) -> fmt::Result {
        let window = self.scene.window.clone();
        let until = |event: &Event| event.until.unwrap_or(window.end);
        let seen = events.into_iter().filter(|event| event.from < window.end && until(event) >= window.start);
        // What goes on at the same time has a row for each.
        let mut rows: Vec<Vec<Bar<'_>>> = Vec::new();
        for event in seen {
            let bar =
                Bar { from: event.from, until: until(event), class, text: event.what.clone(), title: &event.what };
            match rows.iter_mut().find(|row| row.last().is_none_or(|last| last.until <= bar.from)) {
                Some(row) => row.push(bar),
                None => rows.push(vec![bar]),
            }
        }
        rows.iter().try_for_each(|row| self.row(label, row))
    }

    fn roles(&mut self, node: NodeId) -> fmt::Result {
        let window = self.scene.window.clone();
        let seen: Vec<&Observation> = self.scene.observations.iter().filter(|seen| seen.node == node).collect();
        let titles: Vec<String> = seen.iter().map(|seen| format!("{} in term {}", seen.role, seen.term)).collect();
        let mut bars = Vec::new();
        for (place, observation) in seen.iter().enumerate() {
            let until = seen.get(place + 1).map_or(window.end, |next| next.at);
            if until < window.start || observation.at > window.end {
                continue;
            }
            let class = match observation.role.as_str() {
                "leader" => "leader",
                "follower" => "follower",
                _ => "other",
            };
            bars.push(Bar { from: observation.at, until, class, text: titles[place].clone(), title: &titles[place] });
        }
        self.row(&format!("node {node}: role"), &bars)
    }

    fn clients(&mut self) -> fmt::Result {
        let mut clients: BTreeMap<usize, Vec<&Operation>> = BTreeMap::new();
        for operation in &self.scene.operations {
            clients.entry(operation.client).or_default().push(operation);
        }
        for (client, operations) in clients {
            let titles: Vec<String> = operations.iter().map(ToString::to_string).collect();
            let bar = |(place, operation): (usize, &&Operation)| Bar {
                from: operation.called,
                until: operation.returned,
                class: self.class(operation),
                text: brief(operation),
                title: &titles[place],
            };
            let bars: Vec<Bar<'_>> = operations.iter().enumerate().map(bar).collect();
            self.row(&format!("client {client}"), &bars)?;
        }
        Ok(())
    }

    fn class(&self, operation: &Operation) -> &'static str {
        let same = |wrong: &Operation| (wrong.client, wrong.called) == (operation.client, operation.called);
        let wrong = self.scene.concerned.iter().any(same);
        match (&operation.end, operation.request.is_write()) {
            (End::Unknown, _) if wrong => "unknown wrong",
            (End::Unknown, _) => "unknown",
            (End::Refused(_), _) => "refused",
            (_, true) if wrong => "write wrong",
            (_, true) => "write",
            (_, false) if wrong => "read wrong",
            (_, false) => "read",
        }
    }
}

/// What fits into a bar.
fn brief(operation: &Operation) -> String {
    let end = match &operation.end {
        End::Found { tag, .. } => format!("tag {tag}"),
        End::Missing { .. } | End::Absent => "absent".to_owned(),
        End::Listed { items, .. } => format!("{} keys", items.len()),
        End::Stored(tag) => format!("tag {tag}"),
        End::Deleted => "done".to_owned(),
        End::Failed(tag) => tag.map_or_else(|| "412".to_owned(), |tag| format!("412, tag {tag}")),
        End::Refused(status) => status.to_string(),
        End::Unknown => "?".to_owned(),
    };
    let request = match &operation.request {
        Request::Read { fresh: true, .. } => "get",
        Request::Read { fresh: false, .. } => "stale get",
        Request::Put(..) => "put",
        Request::Delete(_) => "delete",
        Request::List { .. } => "list",
    };
    format!("{request} {end}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Condition;

    fn operation(client: usize, called: u64, returned: u64, request: Request, end: End) -> Operation {
        Operation {
            client,
            node: 1,
            boot: 1,
            key: "r/<1>".to_owned(),
            request,
            token: false,
            attempts: 1,
            called: Duration::from_millis(called),
            returned: Duration::from_millis(returned),
            floor: 0,
            end,
        }
    }

    #[test]
    fn a_violation_is_drawn_with_what_was_done_around_it() {
        let write = operation(0, 1000, 1500, Request::Put(7, Condition::Always), End::Stored(5));
        let lost = operation(2, 1200, 1900, Request::Put(8, Condition::Always), End::Unknown);
        let read = Request::Read { fresh: true, after_index: None };
        let wrong = operation(1, 1600, 1700, read, End::Missing { index: 4 });
        let event = |what: &str, nodes: &[NodeId], from, until: Option<u64>| Event {
            kind: "fault",
            what: what.to_owned(),
            nodes: nodes.to_vec(),
            from: Duration::from_millis(from),
            until: until.map(Duration::from_millis),
        };
        let events = [
            event("2 alone", &[], 1100, Some(1800)),
            event("SIGKILL to 3", &[3], 1300, None),
            event("SIGSTOP to 3, long over", &[3], 100, Some(200)),
        ];
        let role =
            |at, role: &str, term| Observation { at: Duration::from_millis(at), node: 1, role: role.to_owned(), term };
        let observations = [role(0, "follower", 1), role(1250, "leader", 2)];
        let scene = Scene {
            window: Duration::from_millis(900)..Duration::from_millis(2000),
            operations: vec![&write, &wrong, &lost],
            concerned: std::slice::from_ref(&wrong),
            events: &events,
            observations: &observations,
        };
        let svg = draw(&scene);
        for words in [
            "client 0",
            "client 1",
            "put tag 5",
            "get absent",
            "class=\"read wrong\"",
            "class=\"unknown\"",
            "2 alone",
            "SIGKILL to 3",
            "leader in term 2",
            "node 3: faults",
            "r/&lt;1&gt;",
            "0.90 s",
            "2.00 s",
        ] {
            assert!(svg.contains(words), "{words:?} is missing in {svg}");
        }
        assert!(!svg.contains("long over") && !svg.contains("r/<1>"), "{svg}");
        assert_eq!(svg.matches("<rect").count(), svg.matches("</rect>").count());
        // The write begins a tenth of the way from the left, and takes five elevenths.
        let at = LABELS_WIDTH + WIDTH / 11.0;
        assert!(svg.contains(&format!("x=\"{at:.1}\"")), "{svg}");
    }
}
