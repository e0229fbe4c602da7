//! A state on its way to take the place of another one as a whole.

use std::fmt;

use super::StateMachine;

/// A state machine that is to take the place of another one. It is read from a peer's snapshot by the thread that
/// receives it: a million keys take seconds, in which neither the driver nor the applier may stand still.
///
/// To free a million keys takes long as well. So whichever state is left in here in the end goes back to that thread:
/// the one that was replaced, or this one if nobody had a use for it.
pub struct Replacement {
    state: StateMachine,
    back: Option<Box<dyn FnOnce(StateMachine) + Send>>,
}

impl Replacement {
    /// Offers `state`. What is left is given to `back`, on whatever thread drops this: `back` must not free it there.
    pub fn new(state: StateMachine, back: impl FnOnce(StateMachine) + Send + 'static) -> Replacement {
        Replacement { state, back: Some(Box::new(back)) }
    }

    /// Lets the offered state take the place of `state`, which goes back when this is dropped.
    pub fn replace(&mut self, state: &mut StateMachine) {
        std::mem::swap(&mut self.state, state);
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if let Some(back) = self.back.take() {
            back(std::mem::take(&mut self.state));
        }
    }
}

impl fmt::Debug for Replacement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Replacement(applied index {})", self.state.applied_index())
    }
}
